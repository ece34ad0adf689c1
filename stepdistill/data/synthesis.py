"""For data that has only prompts: the teacher samples the latents once, with guidance.

The noise of latent k depends on the seed and k alone, so the number of processes and interruptions change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepdistill import rng
from stepdistill.diffusion.noise_path import moves_to
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.conditioning import Conditioning

_NOISE = "teacher's pictures"
"""The name of the random stream that the noise comes from. With another name, a cache that is partly filled would get other
latents."""


@dataclass(frozen=True)
class Synthesis:
    """The teacher as a source of latents.

    teacher     with classifier-free guidance
    steps       of DDIM with trailing timesteps
    shape       (C, h, w) of a latent
    seed        of the noise
    batch_size  latents per U-Net batch
    """

    teacher: Denoiser
    steps: int
    shape: tuple[int, ...]
    seed: int
    batch_size: int

    @torch.no_grad()
    def latents(self, conditioning: Conditioning, numbers: Sequence[int]) -> torch.Tensor:
        """Latents (n, C, h, w), float32 on the CPU, of n rows of conditioning; `numbers` (n) select their noise."""
        parts = []
        for start in range(0, len(numbers), self.batch_size):
            chunk = list(numbers[start : start + self.batch_size])
            rows = torch.arange(start, start + len(chunk))
            parts.append(self._batch(conditioning.rows(rows), chunk))
        return torch.cat(parts)

    def _batch(self, conditioning: Conditioning, numbers: list[int]) -> torch.Tensor:
        network = self.teacher.network
        noise = rng.normal(self.shape, numbers, seed=self.seed, keys=(_NOISE,)).to(network.device)
        moves = moves_to(self.teacher.noise_path.sampling(self.steps, len(numbers)), network.device)
        conditioning = conditioning.to(network.device, network.dtype)
        return self.teacher.rollout(noise, moves, conditioning).float().cpu()
