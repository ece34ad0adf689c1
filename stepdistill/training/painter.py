"""What teacher and student draw while a phase trains, as pictures, in little memory.

The network is asked for no more rows at once than in training. The VAE lies on the CPU: for the time of decoding a copy of
it is where the latents are, and decodes one picture after another.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from PIL import Image

from stepdistill.diffusion.noise_path import moves_to
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.conditioning import Conditioning


@dataclass(frozen=True)
class Painter:
    """Draws with denoisers that are being trained. No weight changes, and no global random state is used.

    Args:
        vae: the teacher's, on the CPU, in the dtype that it is to decode in.
        batch_size: rows that the network is asked for at once.
        autocast: what the network runs under in training.
    """

    vae: AutoencoderKL
    batch_size: int
    autocast: Callable[[], AbstractContextManager]

    @torch.no_grad()
    def draw(
        self, denoiser: Denoiser, noise: torch.Tensor, conditioning: Conditioning, *, steps: int
    ) -> torch.Tensor:
        """What a denoiser draws in `steps` from noise (B, C, h, w): uint8 (B, 3, H, W), on the CPU."""
        model = denoiser.network.model
        latents = []
        for chunk in torch.arange(len(noise)).split(self.batch_size):
            moves = moves_to(denoiser.noise_path.sampling(steps, len(chunk)), model.device)
            prompts = conditioning.rows(chunk).to(model.device, model.dtype)
            with self.autocast():
                latents.append(denoiser.rollout(noise[chunk].to(model.device), moves, prompts))
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
