"""Noise schedules and trailing timestep grids. Pure torch, float64 throughout.

Legend, with the equation numbers of SDXL-Lightning (arXiv 2402.13929):
    alphas_cumprod  abar_t, entry i belongs to U-Net timestep i (paper time t = i + 1)
    alpha_t         sqrt(abar_t)            sigma_t   sqrt(1 - abar_t)
    timestep        int64, 999 = noisiest .. 0, and CLEAN = -1 (alpha 1, sigma 0)
"""

import itertools
from dataclasses import dataclass

import torch

CLEAN = -1
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def make_betas(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_train_timesteps: int
) -> torch.Tensor:
    """betas (num_train_timesteps,), float64, as diffusers' schedulers define them.

    scaled_linear is linear in sqrt(beta) (Stable Diffusion), squaredcos_cap_v2 is Nichol and Dhariwal 2021 with betas
    capped at .999, which ignores beta_start and beta_end. ValueError for any other name.
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
class NoiseSchedule:
    """abar of a diffusion model: alphas_cumprod (num_train_timesteps,), float64."""

    alphas_cumprod: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor, *, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """From betas (T,); zero_terminal_snr rescales as diffusers' rescale_betas_zero_snr does."""
        alphas_cumprod = torch.cumprod(1.0 - betas.double(), dim=0)
        return cls(rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """T, 1000 in every Stable Diffusion model."""
        return len(self.alphas_cumprod)

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep, T - 1."""
        return self.num_train_timesteps - 1

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each (B, 1, ..) with `ndim` dimensions; CLEAN gives 1 and 0."""
        table = self.alphas_cumprod.to(timesteps.device)
        alpha_bar = torch.where(timesteps == CLEAN, 1.0, table[timesteps.clamp(min=0)])
        shape = (-1,) + (1,) * (ndim - 1)
        return alpha_bar.sqrt().to(dtype).view(shape), (1.0 - alpha_bar).sqrt().to(dtype).view(shape)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        pure_noise_at_last: bool = False,
    ) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t e (Eq 1), (B, ...); at CLEAN the original comes back.

        pure_noise_at_last: at the last timestep the noise itself is returned (Eq 24), as sampling starts from it.
        """
        ndim = original_samples.ndim
        alpha, sigma = self.alpha_sigma(timesteps, ndim=ndim, dtype=original_samples.dtype)
        noisy = alpha * original_samples + sigma * noise
        if not pure_noise_at_last:
            return noisy
        last = (timesteps == self.last_timestep).view((-1,) + (1,) * (ndim - 1))
        return torch.where(last, noise, noisy)


def trailing_timesteps(num_inference_steps: int, *, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The nodes (N,) of an N-step sampler, noisiest first: round(arange(T, 0, -T/N)) - 1, int64.

    `trailing` of Lin et al. 2023, table 2; the next node after the last one is CLEAN.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: got {num_inference_steps}; allowed: 1 to {num_train_timesteps}"
        )
    nodes = num_train_timesteps - torch.arange(num_inference_steps, dtype=torch.float64) * (
        num_train_timesteps / num_inference_steps
    )
    return nodes.round().long() - 1


def timestep_pairs(num_inference_steps: int, *, num_train_timesteps: int = 1000) -> list[tuple[int, int]]:
    """The (timestep, prev_timestep) moves of a whole N-step sampling, the last one to CLEAN."""
    nodes = [
        *trailing_timesteps(num_inference_steps, num_train_timesteps=num_train_timesteps).tolist(),
        CLEAN,
    ]
    return list(itertools.pairwise(nodes))


def jump(timesteps: torch.Tensor, student_steps: int, *, num_train_timesteps: int = 1000) -> torch.Tensor:
    """prev_timestep (B,) of one student move: the next node of the student's grid, or where the timestep lies between
    two of its nodes, T / student_steps further down, clamped at CLEAN (section 2 of the recipe: 250 - 500 -> 0)."""
    nodes = trailing_timesteps(student_steps, num_train_timesteps=num_train_timesteps).to(timesteps.device)
    nodes_and_clean = torch.cat([nodes, torch.full((1,), CLEAN, device=timesteps.device)])
    on_grid = timesteps[:, None] == nodes[None, :]
    following = nodes_and_clean[on_grid.int().argmax(dim=1) + 1]
    stepped = (timesteps - round(num_train_timesteps / student_steps)).clamp(min=CLEAN)
    return torch.where(on_grid.any(dim=1), following, stepped)


def substep_path(
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    teacher_steps: int,
    *,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    """The nodes a teacher of `teacher_steps` visits from timesteps (B,) to prev_timesteps (B,): int64 (B, K + 1).

    Column 0 is timesteps, the last one prev_timesteps, with the teacher's own nodes between; shorter rows repeat
    prev_timestep at their end, a move to where they already are.
    """
    nodes = trailing_timesteps(teacher_steps, num_train_timesteps=num_train_timesteps).tolist()
    rows = []
    for start, end in zip(timesteps.tolist(), prev_timesteps.tolist(), strict=True):
        if end >= start:
            raise ValueError(f"a move goes from noisy to clean; got timestep {start} -> prev_timestep {end}")
        rows.append([start, *(node for node in nodes if end < node < start), end])
    width = max(len(row) for row in rows)
    padded = [row + [row[-1]] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=timesteps.device)
