"""Draws images with teacher and student while a phase trains, in little memory.

The network gets no more rows at once than in training. The VAE stays on the CPU: for decoding, a copy of it is put on the
latents' device and decodes one image after another.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from PIL import Image

from stepdistill.diffusion.noise_path import moves_to
from stepdistill.images.latents import unscaled
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.runtime import is_out_of_memory, release_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Painter:
    """Draws with denoisers that are being trained. No weight changes, and no global random state is used.

    Args:
        vae: the teacher's VAE, on the CPU, in the dtype in which it decodes.
        batch_size: rows that the network gets at once.
    """

    vae: AutoencoderKL
    batch_size: int

    @torch.no_grad()
    def draw(
        self, denoiser: Denoiser, noise: torch.Tensor, conditioning: Conditioning, *, steps: int
    ) -> torch.Tensor:
        """Samples a denoiser from noise (B, C, h, w) in `steps` steps; returns images, uint8 (B, 3, H, W), on the CPU."""
        network = denoiser.network
        latents = []
        for chunk in torch.arange(len(noise)).split(self.batch_size):
            moves = moves_to(denoiser.noise_path.sampling(steps, len(chunk)), network.device)
            prompts = conditioning.rows(chunk).to(network.device, network.dtype)
            latents.append(denoiser.rollout(noise[chunk].to(network.device), moves, prompts))
        return decode_latents(self.vae, torch.cat(latents))


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decodes scaled latents (B, C, h, w) on any device to uint8 (B, 3, H, W) on the CPU, one row at a time.

    It decodes in the VAE's dtype. The VAE stays on the CPU; the copy on the latents' device is freed afterwards.
    """
    on_cpu = latents.device.type == "cpu"
    decoder = vae if on_cpu else copy.deepcopy(vae).to(latents.device)
    images, broken = [], 0
    for row in latents.split(1):
        decoded = decoder.decode(unscaled(vae, row).to(vae.dtype)).sample
        scaled = ((decoded.float() + 1) * 127.5).round().cpu()
        broken += int(not scaled.isfinite().all())
        images.append(scaled.clamp(0, 255).to(torch.uint8))
    if latents.device.type == "cuda":
        del decoder, decoded
        torch.cuda.empty_cache()  # large blocks, which training would fragment
    if broken:
        logger.warning(
            "distill: %d of %d preview images have values that are not finite", broken, len(images)
        )
    return torch.cat(images)


@contextmanager
def skipped_without_memory(what: str) -> Iterator[None]:
    """Inside it, running out of memory ends the drawing with a warning, and training goes on without the file `what`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("distill: out of memory: %s is not drawn; training goes on", what)
    else:
        return
    release_memory()  # outside of the except clause, whose error keeps the tensors of the drawing alive


def to_images(images: torch.Tensor) -> list[Image.Image]:
    """Turns a uint8 tensor (B, 3, H, W) into a list of Pillow images."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
