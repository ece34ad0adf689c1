"""How far colour, contrast and sharpness of images are from the teacher's: differences that a viewer can see."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # ITU-R BT.601
_TINY = 1e-12  # if both sets are flat, the ratio is 1 and the drift 0


@dataclass(frozen=True)
class Looks:
    """Statistics of N images, float64.

    colour     (N, 3), mean R, G, B in grey levels
    contrast   (N,), standard deviation of luma
    sharpness  (N,), variance of the Laplacian of luma, which blur lowers
    """

    colour: torch.Tensor
    contrast: torch.Tensor
    sharpness: torch.Tensor

    def __len__(self) -> int:
        return len(self.colour)


def looks_of(batches: Iterable[torch.Tensor]) -> Looks:
    """The statistics of uint8 images, given in batches (B, 3, H, W)."""
    rows = torch.cat([_statistics(batch) for batch in batches])
    return Looks(rows[:, :3], rows[:, 3], rows[:, 4])


def colour_distances(mine: Looks, theirs: Looks) -> torch.Tensor:
    """Root mean square distance between the mean R, G, B of images of the same index, in grey levels (N,)."""
    return (mine.colour - theirs.colour).square().sum(dim=1).div(3).sqrt()


def looks_drift(mine: Looks, theirs: Looks) -> dict[str, float]:
    """`image_drift` from statistics that are already computed; ValueError if the numbers of images differ."""
    if len(mine) != len(theirs):
        raise ValueError(f"drift of {len(mine)} images against {len(theirs)}")
    contrast, sharpness = (
        float((of_mine.mean() + _TINY) / (of_theirs.mean() + _TINY)) - 1
        for of_mine, of_theirs in ((mine.contrast, theirs.contrast), (mine.sharpness, theirs.sharpness))
    )
    colour = float(colour_distances(mine, theirs).mean())
    return {"colour_drift": colour, "contrast_drift": contrast, "sharpness_drift": sharpness}


def image_drift(images: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> dict[str, float]:
    """How uint8 images in batches (B, 3, H, W) differ from as many reference images, paired by index.

    colour_drift     root mean square distance of an image's mean R, G, B to its reference's, in grey levels, averaged
    contrast_drift   mean standard deviation of luma, divided by the reference's, minus 1
    sharpness_drift  mean variance of the Laplacian of luma, divided by the reference's, minus 1; below 0 is blur
    ValueError if the numbers of images differ.
    """
    return looks_drift(looks_of(images), looks_of(reference))


def _statistics(images: torch.Tensor) -> torch.Tensor:
    """(B, 5): mean R, G, B, standard deviation of luma, variance of the Laplacian of luma."""
    x = images.double()
    luma = torch.einsum("bchw,c->bhw", x, _LUMA.to(x.device))
    laplacian = (
        luma[:, :-2, 1:-1]
        + luma[:, 2:, 1:-1]
        + luma[:, 1:-1, :-2]
        + luma[:, 1:-1, 2:]
        - 4 * luma[:, 1:-1, 1:-1]
    )
    spread = torch.stack([luma.flatten(1).std(dim=1), laplacian.flatten(1).var(dim=1)], dim=1)
    return torch.cat([x.mean(dim=(2, 3)), spread], dim=1)
