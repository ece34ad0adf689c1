"""Prompts alone: the teacher makes the latents, with guidance, once.

Latent k of a run comes from noise named by k, so it is the same whatever the processes and the interruptions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from stepdistill import rng
from stepdistill.diffusion.schedule import CLEAN, NoiseSchedule, trailing_timesteps
from stepdistill.diffusion.solver import guide, rollout
from stepdistill.models.conditioning import Conditioning, ask


@dataclass(frozen=True)
class Synthesis:
    """The teacher as a source of latents.

    shape: (C, h, w).  steps: of DDIM with trailing timesteps.  seed: of the noise.
    """

    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    prediction_type: str
    unconditional: Conditioning
    guidance_scale: float
    steps: int
    shape: tuple[int, ...]
    seed: int
    batch_size: int

    @torch.no_grad()
    def latents(self, told: Conditioning, numbers: Sequence[int]) -> torch.Tensor:
        """(n, C, h, w) in float32 on the CPU, of n rows of conditioning; `numbers` name their noise."""
        parts = []
        for start in range(0, len(numbers), self.batch_size):
            chunk = list(numbers[start : start + self.batch_size])
            rows = torch.arange(start, start + len(chunk))
            parts.append(self._batch(told.rows(rows), chunk))
        return torch.cat(parts)

    def _batch(self, told: Conditioning, numbers: list[int]) -> torch.Tensor:
        device, dtype = self.unet.device, self.unet.dtype
        told, empty = told.to(device, dtype), self.unconditional.to(device, dtype)
        noise = rng.normal(self.shape, numbers, seed=self.seed, keys=("teacher's pictures",)).to(device)
        nodes = trailing_timesteps(self.steps, num_train_timesteps=self.schedule.num_train_timesteps)
        path = torch.cat([nodes, torch.tensor([CLEAN])]).expand(len(numbers), -1).to(device)

        def predict(rows: torch.Tensor, state: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            own = told.rows(rows)
            if self.guidance_scale == 1.0:
                return ask(self.unet, state, timesteps, own)
            both = Conditioning.concat(empty.beside(own), own)
            output = ask(self.unet, torch.cat([state, state]), torch.cat([timesteps, timesteps]), both)
            uncond, cond = output.chunk(2)
            return guide(uncond, cond, self.guidance_scale)

        kind = self.prediction_type
        return rollout(predict, noise, path, schedule=self.schedule, prediction_type=kind).float().cpu()
