"""What teacher and student draw while a phase trains, as pictures, in little memory.

The U-Net is asked for no more rows at once than in training. The VAE lies on the CPU: for the time of decoding a copy of it
is where the latents are, and decodes one picture after another.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from PIL import Image

from stepdistill.diffusion.schedule import CLEAN, trailing_timesteps
from stepdistill.diffusion.solver import rollout
from stepdistill.models.conditioning import Conditioning
from stepdistill.training.steps import Denoisers, teacher_rollout


@dataclass(frozen=True)
class Painter:
    """Draws with the networks that are being trained. No weight changes, and no global random state is used.

    Args:
        vae: the teacher's, on the CPU, in the dtype that it is to decode in.
        batch_size: rows that the U-Net is asked for at once.
        autocast: what the U-Net runs under in training.
    """

    vae: AutoencoderKL
    batch_size: int
    autocast: Callable[[], AbstractContextManager]

    def of_teacher(
        self, nets: Denoisers, noise: torch.Tensor, conditioning: Conditioning, *, steps: int
    ) -> torch.Tensor:
        """What the teacher draws in `steps` from noise (B, C, h, w): uint8 (B, 3, H, W), on the CPU."""

        def draw(rows: torch.Tensor, told: Conditioning) -> torch.Tensor:
            return teacher_rollout(nets, rows, _path(steps, len(rows), nets), told)

        return self._pictures(draw, nets, noise, conditioning)

    def of_student(
        self, nets: Denoisers, noise: torch.Tensor, conditioning: Conditioning, *, steps: int
    ) -> torch.Tensor:
        """The same of the student."""

        def draw(rows: torch.Tensor, told: Conditioning) -> torch.Tensor:
            with nets.roles.student():
                return rollout(
                    lambda which, state, timesteps: nets.roles.predict(state, timesteps, told.rows(which)),
                    rows,
                    nets.told(_path(steps, len(rows), nets)),
                    schedule=nets.schedule,
                    prediction_type=nets.student_prediction_type,
                )

        return self._pictures(draw, nets, noise, conditioning)

    @torch.no_grad()
    def _pictures(
        self,
        draw: Callable[[torch.Tensor, Conditioning], torch.Tensor],
        nets: Denoisers,
        noise: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        device, dtype = nets.roles.unet.device, nets.roles.unet.dtype
        latents = []
        for chunk in torch.arange(len(noise)).split(self.batch_size):
            told = conditioning.rows(chunk).to(device, dtype)
            with self.autocast():
                latents.append(draw(noise[chunk].to(device), told))
        return decode_pictures(self.vae, torch.cat(latents))


@torch.no_grad()
def decode_pictures(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) on any device -> uint8 (B, 3, H, W) on the CPU, in the VAE's dtype, one row at a time.

    The VAE stays on the CPU: a copy of it is on the latents' device, and gone from there afterwards.
    """
    on_cpu = latents.device.type == "cpu"
    decoder = vae if on_cpu else copy.deepcopy(vae).to(latents.device)
    pictures = []
    for row in latents.split(1):
        decoded = decoder.decode((row / vae.config.scaling_factor).to(vae.dtype)).sample
        pictures.append(((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    if latents.device.type == "cuda":
        del decoder, decoded
        torch.cuda.empty_cache()  # large blocks that training would cut up
    return torch.cat(pictures)


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """uint8 (B, 3, H, W) as Pillow has them."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]


def _path(steps: int, rows: int, nets: Denoisers) -> torch.Tensor:
    """The grid of a sampler's steps down to the clean sample, (rows, steps + 1), where the U-Net is."""
    nodes = trailing_timesteps(steps, num_train_timesteps=nets.schedule.num_train_timesteps)
    path = torch.cat([nodes, torch.tensor([CLEAN])])
    return path.expand(rows, -1).to(nets.roles.unet.device)
