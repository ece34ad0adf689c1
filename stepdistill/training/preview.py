"""Pictures while training: the student's samples under the teacher's, at fixed prompts and noise."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.diffusion.schedule import CLEAN, trailing_timesteps
from stepdistill.diffusion.solver import Predictor, rollout
from stepdistill.models.conditioning import Conditioning
from stepdistill.report.grid import image_grid
from stepdistill.training.steps import Denoisers, teacher_rollout

_MOST_TEACHER_STEPS = 32


class Preview:
    """Draws one rung's previews into a folder.

    Args:
        vae: the teacher's decoder.
        cache: holds the embeddings of `prompts`.
        prompts: one column each.
        seed: of the fixed noise.
        folder: where the PNGs go.
    """

    def __init__(
        self, vae: AutoencoderKL, cache: LatentCache, prompts: list[str], *, seed: int, folder: Path
    ) -> None:
        self._vae, self._folder = vae, folder
        self._conditioning = cache.of_prompts(prompts)
        shape = cache.latent_shapes[max(cache.sizes, key=lambda size: cache.sizes[size])]
        self._noise = rng.normal(shape, list(range(len(prompts))), seed=seed, keys=("preview",))
        self._teacher_row: tuple[object, list[Image.Image]] | None = None

    @torch.no_grad()
    def draw(self, name: str, nets: Denoisers, *, teacher_steps: int, student_steps: int) -> Path:
        """Writes NAME.png: teacher above, student below. Few-step samples of 32 steps at most for the teacher."""
        device, dtype = nets.roles.unet.device, nets.roles.unet.dtype
        conditioning = self._conditioning.to(device, dtype)
        noise = self._noise.to(device)
        steps = min(teacher_steps, _MOST_TEACHER_STEPS)
        if self._teacher_row is None or self._teacher_row[0] != (steps, nets.roles.teacher_is_base):
            path = self._path(steps, len(noise), nets).to(device)
            latents = teacher_rollout(nets, noise, path, conditioning)
            self._teacher_row = ((steps, nets.roles.teacher_is_base), self._decode(latents))
        with nets.roles.student():
            latents = rollout(
                _predictor(nets, conditioning),
                noise,
                nets.told(self._path(student_steps, len(noise), nets)).to(device),
                schedule=nets.schedule,
                prediction_type=nets.student_prediction_type,
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"{name}.png"
        rows = {f"teacher {steps}": self._teacher_row[1], f"student {student_steps}": self._decode(latents)}
        image_grid(rows).save(target)
        return target

    def _path(self, steps: int, rows: int, nets: Denoisers) -> torch.Tensor:
        nodes = trailing_timesteps(steps, num_train_timesteps=nets.schedule.num_train_timesteps)
        return torch.cat([nodes, torch.tensor([CLEAN])]).expand(rows, -1)

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        vae = self._vae.to(latents.device)
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        pixels = ((vae.decode(scaled).sample.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


def _predictor(nets: Denoisers, conditioning: Conditioning) -> Predictor:
    def predict(rows: torch.Tensor, state: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return nets.roles.predict(state, timesteps, conditioning.rows(rows))

    return predict
