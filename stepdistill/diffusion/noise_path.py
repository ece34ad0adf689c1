"""Noise paths: how much signal and how much noise x_t contains, and the moves of samplers on the path. In float64.

Legend, with the equation numbers of SDXL-Lightning (arXiv 2402.13929):
    x_t             alpha_t x_0 + sigma_t e (Eq 1)
    timestep        int64: T - 1 (noisiest, 999) down to 0, then CLEAN = -1 (alpha 1, sigma 0)

variance_preserving.py has the path of diffusion models, rectified_flow.py that of flow-matching models. They differ in
alpha_t and sigma_t and in how the network is given a timestep; grids and moves are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stepdistill.diffusion import grid
from stepdistill.diffusion.grid import CLEAN


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

    def network_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is given in place of timesteps (B,)."""

    def timestep_at(self, level: float) -> int:
        """The timestep of a noise level, a number from 0 to 1: of the time t / T, or on a flow of sigma."""

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


class TimestepPath:
    """What noise paths on timesteps 0 .. T - 1 have in common; a subclass has `num_train_timesteps` and `alpha_sigma`."""

    @property
    def num_train_timesteps(self) -> int:
        """T; 1000 in every Stable Diffusion model."""
        raise NotImplementedError

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep, T - 1."""
        return self.num_train_timesteps - 1

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each of shape (B, 1, ..) with `ndim` dimensions; 1 and 0 at CLEAN."""
        raise NotImplementedError

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
