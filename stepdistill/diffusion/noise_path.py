"""Noise paths: how much signal and how much noise x_t contains, and the moves of samplers on the path. In float64.

Legend, with the equation numbers of SDXL-Lightning (arXiv 2402.13929):
    x_t             alpha_t x_0 + sigma_t e (Eq 1)
    alphas_cumprod  abar_t; entry i belongs to the network's timestep i (the paper's time t = i + 1)
    alpha_t         sqrt(abar_t)            sigma_t   sqrt(1 - abar_t)
    timestep        int64: 999 (noisiest) down to 0, then CLEAN = -1 (alpha 1, sigma 0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stepdistill.diffusion import grid
from stepdistill.diffusion.grid import CLEAN

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
class Move:
    """One step of a sampler for some rows of a batch.

    rows            int64 (n,), the rows that take this step; None: all rows
    timesteps       (n,), before the step
    prev_timesteps  (n,), after the step: cleaner
    """

    rows: torch.Tensor | None
    timesteps: torch.Tensor
    prev_timesteps: torch.Tensor

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Move":
        """The move with every tensor changed."""
        rows = None if self.rows is None else change(self.rows)
        return Move(rows, change(self.timesteps), change(self.prev_timesteps))


def moves_to(moves: Sequence[Move], device: torch.device | str) -> list[Move]:
    """The moves on another device, copied in one transfer: each of several small ones would make the host wait."""
    parts = [part for m in moves for part in (m.rows, m.timesteps, m.prev_timesteps) if part is not None]
    packed = iter(torch.cat(parts).to(device).split([len(part) for part in parts]))
    return [Move(None if m.rows is None else next(packed), next(packed), next(packed)) for m in moves]


class NoisePath(Protocol):
    """How noise is added to clean samples, x_t = alpha_t x_0 + sigma_t e, and the timesteps that samplers visit on the way
    back. Training uses a noise path only through these methods.

    Timesteps are whole numbers from last_timestep (noisiest) down to 0; CLEAN = -1 stands for the clean sample, at which
    alpha is 1 and sigma 0.
    """

    def to(self, device: torch.device | str) -> "NoisePath":
        """The same path with its tensors on another device."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps that the model was trained on, without CLEAN."""

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep, at which sampling starts from pure noise."""

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether x_t holds no signal at the last timestep, where alpha_T is 0 (zero terminal SNR)."""

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each of shape (B, 1, ..) with `ndim` dimensions; 1 and 0 at CLEAN."""

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        pure_noise_at_last: bool = False,
    ) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t e, (B, ...), for timesteps (B,); at CLEAN the original samples themselves.

        pure_noise_at_last: at the last timestep return the noise itself, because sampling starts from it.
        """

    def nodes(self, steps: int) -> torch.Tensor:
        """The timesteps (N,), int64, at which an N-step sampler calls the network, noisiest first."""

    def jump(self, timesteps: Sequence[int], student_steps: int) -> list[int]:
        """Where a step of a `student_steps`-step sampler leads to from each of the timesteps; CLEAN after the last node."""

    def substeps(self, timesteps: Sequence[int], prev_timesteps: Sequence[int], steps: int) -> list[Move]:
        """The moves by which an N-step sampler brings each row of a batch from its timestep to its prev_timestep.

        A row that arrives before the others is left out of later moves. ValueError if a row's prev_timestep is not cleaner.
        """

    def sampling(self, steps: int, batch_size: int) -> list[Move]:
        """The moves of an N-step sampler for batch_size rows, from pure noise to the clean sample."""


@dataclass(frozen=True)
class VariancePreserving:
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
    def last_timestep(self) -> int:
        """The noisiest timestep, T - 1."""
        return self.num_train_timesteps - 1

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether alpha_T is 0 (zero terminal SNR)."""
        return not float(self.alphas_cumprod[-1]) > 0

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each of shape (B, 1, ..) with `ndim` dimensions; 1 and 0 at CLEAN."""
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
        """x_t = alpha_t x_0 + sigma_t e (Eq 1), (B, ...); at CLEAN the original samples are returned.

        pure_noise_at_last: at the last timestep return the noise itself (Eq 24), because sampling starts from it.
        """
        ndim = original_samples.ndim
        alpha, sigma = self.alpha_sigma(timesteps, ndim=ndim, dtype=original_samples.dtype)
        noisy = alpha * original_samples + sigma * noise
        if not pure_noise_at_last:
            return noisy
        last = (timesteps == self.last_timestep).view((-1,) + (1,) * (ndim - 1))
        return torch.where(last, noise, noisy)

    def nodes(self, steps: int) -> torch.Tensor:
        """The timesteps (N,), int64, that an N-step sampler visits, noisiest first; ValueError unless 1 <= N <= T."""
        return torch.tensor(grid.trailing_nodes(steps, num_train_timesteps=self.num_train_timesteps))

    def jump(self, timesteps: Sequence[int], student_steps: int) -> list[int]:
        """The timesteps that one move of the student leads to from these timesteps; CLEAN after the last node."""
        count = self.num_train_timesteps
        return [grid.next_node(t, student_steps, num_train_timesteps=count) for t in timesteps]

    def substeps(self, timesteps: Sequence[int], prev_timesteps: Sequence[int], steps: int) -> list[Move]:
        """The moves of an N-step sampler that bring each row from its timestep to its prev_timestep, on the CPU.

        A row that arrives before the others is left out of later moves. ValueError if a row's prev_timestep is not cleaner.
        """
        count = self.num_train_timesteps
        routes = [
            grid.substeps(start, end, steps, num_train_timesteps=count)
            for start, end in zip(timesteps, prev_timesteps, strict=True)
        ]
        moves = []
        for k in range(max(map(len, routes)) - 1):
            under_way = [row for row, route in enumerate(routes) if k + 1 < len(route)]
            rows = None if len(under_way) == len(routes) else torch.tensor(under_way)
            starts, ends = (torch.tensor([routes[row][k + j] for row in under_way]) for j in (0, 1))
            moves.append(Move(rows, starts, ends))
        return moves

    def sampling(self, steps: int, batch_size: int) -> list[Move]:
        """The moves of an N-step sampler for batch_size rows, from pure noise to the clean sample, on the CPU."""
        return self.substeps([self.last_timestep] * batch_size, [CLEAN] * batch_size, steps)
