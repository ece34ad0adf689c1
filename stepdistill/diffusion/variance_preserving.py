"""The noise path of diffusion models: alpha_t^2 + sigma_t^2 = 1, from a table of betas.

alphas_cumprod  abar_t; entry i belongs to the network's timestep i (the paper's time t = i + 1)
alpha_t         sqrt(abar_t)            sigma_t   sqrt(1 - abar_t)
"""

from dataclasses import dataclass

import torch

from stepdistill.diffusion.grid import CLEAN
from stepdistill.diffusion.noise_path import TimestepPath

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def make_betas(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_train_timesteps: int
) -> torch.Tensor:
    """betas (num_train_timesteps,), float64, as diffusers' schedulers define them.

    scaled_linear is linear in sqrt(beta) (Stable Diffusion). squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal
    2021 with betas capped at .999; it ignores beta_start and beta_end. ValueError for any other name.
    """
    n = num_train_timesteps
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, n, dtype=torch.float64) ** 2
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
    if beta_schedule == "squaredcos_cap_v2":
        edges = torch.arange(n + 1, dtype=torch.float64) / n
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule: got {beta_schedule!r}; allowed: {', '.join(BETA_SCHEDULES)}")


def rescale_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(abar) so that abar_T = 0 and abar_1 stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


@dataclass(frozen=True)
class VariancePreserving(TimestepPath):
    """The noise path of a diffusion model with alpha_t^2 + sigma_t^2 = 1.

    alphas_cumprod  (num_train_timesteps,), float64
    """

    alphas_cumprod: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor, *, zero_terminal_snr: bool = False) -> "VariancePreserving":
        """The path of betas (T,); zero_terminal_snr rescales it as diffusers' rescale_betas_zero_snr does."""
        alphas_cumprod = torch.cumprod(1.0 - betas.double(), dim=0)
        return cls(rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)

    def to(self, device: torch.device | str) -> "VariancePreserving":
        """The same path with alphas_cumprod on another device, so that looking up timesteps there needs no copy."""
        return VariancePreserving(self.alphas_cumprod.to(device))

    @property
    def num_train_timesteps(self) -> int:
        """T; 1000 in every Stable Diffusion model."""
        return len(self.alphas_cumprod)

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether alpha_T is 0 (zero terminal SNR)."""
        return not float(self.alphas_cumprod[-1]) > 0

    def network_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps themselves."""
        return timesteps

    def timestep_at(self, level: float) -> int:
        """The timestep at `level` T: the paper's time t is timestep t - 1."""
        return max(0, round(level * self.num_train_timesteps) - 1)

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each of shape (B, 1, ..) with `ndim` dimensions; 1 and 0 at CLEAN."""
        table = self.alphas_cumprod.to(timesteps.device)
        alpha_bar = torch.where(timesteps == CLEAN, 1.0, table[timesteps.clamp(min=0)])
        shape = (-1,) + (1,) * (ndim - 1)
        return alpha_bar.sqrt().to(dtype).view(shape), (1.0 - alpha_bar).sqrt().to(dtype).view(shape)
