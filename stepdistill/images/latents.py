"""Latents as networks are trained on them: (z - shift_factor) scaling_factor of the VAE's z. Older VAEs have no shift."""

import torch
from diffusers import AutoencoderKL


def scaled(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What a network is trained on, from what the VAE encodes, both (B, C, h, w)."""
    shift = vae.config.shift_factor
    return (latents if shift is None else latents - shift) * vae.config.scaling_factor


def unscaled(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What the VAE decodes, from what a network draws, both (B, C, h, w)."""
    shift, latents = vae.config.shift_factor, latents / vae.config.scaling_factor
    return latents if shift is None else latents + shift
