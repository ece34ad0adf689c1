"""The noise path of flow-matching models: a straight line from the clean sample to noise (Liu et al. 2022, 2209.03003).

    u_t       (t + 1) / T: the share of the way at timestep t; 0 at CLEAN, 1 at the last timestep
    sigma_t   shift u_t / (1 + (shift - 1) u_t)      (Esser et al. 2024, 2403.03206, Eq 23)
    alpha_t   1 - sigma_t
    velocity  e - x_0, which the network predicts; it is given sigma_t T in place of t

A sampler's steps are equal in u. So the grids of 128, 32, 8, 4, 2 and 1 steps nest, and the shift moves all alike.
"""

import math
from dataclasses import dataclass

import torch

from stepdistill.diffusion.noise_path import TimestepPath


@dataclass(frozen=True)
class RectifiedFlow(TimestepPath):
    """The noise path of a flow-matching model.

    shift  above 1 spends more of a sampler's steps on noisy samples; larger images need more. 1: steps equal in sigma
    count  T, which only fixes how finely timesteps divide the way
    """

    shift: float = 1.0
    count: int = 1000

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift: got {self.shift}; allowed: numbers above 0")

    def to(self, device: torch.device | str) -> "RectifiedFlow":
        """The same path: it has no tensors."""
        return self

    @property
    def num_train_timesteps(self) -> int:
        """T; 1000 in every published model."""
        return self.count

    @property
    def ends_in_pure_noise(self) -> bool:
        """True: sigma is 1 at the last timestep."""
        return True

    def network_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """sigma_t T, float32, as FlowMatchEulerDiscreteScheduler gives it to the network."""
        _, sigma = self.alpha_sigma(timesteps)
        return (sigma * self.count).float()

    def timestep_at(self, level: float) -> int:
        """The timestep whose sigma is nearest to `level`."""
        way = level / (self.shift - (self.shift - 1) * level)
        return max(0, round(way * self.count) - 1)

    def alpha_sigma(
        self, timesteps: torch.Tensor, *, ndim: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t at timesteps (B,), each of shape (B, 1, ..) with `ndim` dimensions; 1 and 0 at CLEAN."""
        way = (timesteps.double() + 1) / self.count
        sigma = self.shift * way / (1 + (self.shift - 1) * way)
        shape = (-1,) + (1,) * (ndim - 1)
        return (1 - sigma).to(dtype).view(shape), sigma.to(dtype).view(shape)
