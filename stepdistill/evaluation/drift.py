"""How colour, contrast and sharpness moved from the teacher's images, in numbers a person can see."""

from collections.abc import Iterable

import torch

_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # ITU-R BT.601
_TINY = 1e-12  # flat images against flat ones have no drift


def image_drift(images: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> dict[str, float]:
    """Of uint8 images in batches (B, 3, H, W) against the same number of reference images, paired by index.

    colour_drift     root mean square distance of an image's mean R, G, B to its reference's, in grey levels
    contrast_drift   mean standard deviation of luma over the reference's, minus 1
    sharpness_drift  mean variance of luma's Laplacian over the reference's, minus 1: below 0 is blur
    ValueError where the numbers of images differ.
    """
    mine, theirs = (_statistics(batches) for batches in (images, reference))
    if len(mine) != len(theirs):
        raise ValueError(f"drift of {len(mine)} images against {len(theirs)}")
    contrast, sharpness = (
        float((mine[:, k].mean() + _TINY) / (theirs[:, k].mean() + _TINY)) - 1 for k in (3, 4)
    )
    colour = (mine[:, :3] - theirs[:, :3]).square().sum(dim=1).div(3).sqrt().mean()
    return {"colour_drift": float(colour), "contrast_drift": contrast, "sharpness_drift": sharpness}


def _statistics(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """(N, 5): mean R, G, B, standard deviation of luma, variance of its Laplacian."""
    rows = []
    for batch in batches:
        x = batch.double()
        luma = torch.einsum("bchw,c->bhw", x, _LUMA.to(x.device))
        laplacian = (
            luma[:, :-2, 1:-1]
            + luma[:, 2:, 1:-1]
            + luma[:, 1:-1, :-2]
            + luma[:, 1:-1, 2:]
            - 4 * luma[:, 1:-1, 1:-1]
        )
        mean = x.mean(dim=(2, 3))
        spread = torch.stack([luma.flatten(1).std(dim=1), laplacian.flatten(1).var(dim=1)], dim=1)
        rows.append(torch.cat([mean, spread], dim=1))
    return torch.cat(rows)
