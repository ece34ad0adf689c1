"""The numbers of the table. Owns torchmetrics."""

from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepdistill.demo.letters import Triple
from stepdistill.demo.reader import Reader


def fid(first: torch.Tensor, second: torch.Tensor, *, features: nn.Module, batch_size: int = 256) -> float:
    """Frechet distance between two sets of uint8 images (N, 3, H, W) on `features`, moments in float64, never below 0.

    `features` maps uint8 images to (B, D) and has `num_features` = D (Heusel et al. 2017, Eq 6).
    """
    height, width = first.shape[-2:]
    metric = FrechetInceptionDistance(feature=features, input_img_size=(3, height, width)).set_dtype(
        torch.float64
    )
    for images, real in ((first, True), (second, False)):
        for chunk in images.split(batch_size):
            metric.update(chunk, real=real)
    return max(0.0, float(metric.compute()))


@torch.no_grad()
def prompt_accuracy(images: torch.Tensor, wanted: Sequence[Triple], *, reader: Reader) -> float:
    """Share of uint8 images (N, 3, 32, 32) whose letter, ink and paper are all as the prompt says."""
    seen = [triple for chunk in images.split(256) for triple in reader.read(chunk)]
    return sum(a == b for a, b in zip(seen, wanted, strict=True)) / len(seen)


def latent_mse(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean squared error between final latents (N, C, h, w) from equal noise."""
    return float((latents.double() - reference.double()).square().mean())
