"""Resize protocols: ways to bring images to a feature extractor's size. Distances compare only under the same protocol.

torchmetrics   bilinear, antialiased, floating point (torchmetrics with antialias=True)
tf1            TensorFlow 1's bilinear: output pixel k samples at k * in / out, no antialiasing (the original FID code)
pil_bicubic    PIL bicubic per channel in floating point, clipped to 0..255 (clean-fid)
lanczos512     PIL Lanczos to 512 in 8 bit, then torchmetrics (as in published tables on COCO 10k)
"""

import numpy as np
import torch
from PIL import Image

RESIZES = ("none", "torchmetrics", "tf1", "pil_bicubic", "lanczos512")


def resize(images: torch.Tensor, protocol: str, *, size: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size) in 0..255, without regard to the aspect ratio.

    Protocol "none" keeps the size. ValueError for an unknown protocol.
    """
    if protocol not in RESIZES:
        raise ValueError(f"resize: got {protocol!r}; allowed: {', '.join(RESIZES)}")
    if protocol == "none":
        return images.float()
    if protocol == "tf1":
        return _tensorflow1(images.float(), size)
    if protocol == "pil_bicubic":
        return torch.stack([_pil_bicubic(image, size) for image in images])
    if protocol == "lanczos512":
        images = torch.stack([_lanczos(image, 512) for image in images])
    return _antialiased(images.float(), size)


def center_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """The size x size centre of images (B, 3, H, W); ValueError if the images are smaller."""
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise ValueError(
            f"evaluation.patch_size: got {size}; allowed: up to {min(height, width)}, the images' side"
        )
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def _antialiased(images: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        images, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )


def _tensorflow1(images: torch.Tensor, size: int) -> torch.Tensor:
    for axis in (-2, -1):
        length = images.shape[axis]
        at = torch.arange(size, dtype=torch.float64) * (length / size)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        shape = (-1, 1) if axis == -2 else (-1,)
        weight = (at - low).to(images).view(shape)
        low_part, high_part = (images.index_select(axis, i.to(images.device)) for i in (low, high))
        images = low_part + (high_part - low_part) * weight
    return images


def _pil_bicubic(image: torch.Tensor, size: int) -> torch.Tensor:
    channels = [
        np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC))
        for c in image.cpu().numpy().astype(np.float32)
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255).to(image.device)


def _lanczos(image: torch.Tensor, size: int) -> torch.Tensor:
    pil = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    pixels = np.array(pil.resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(image.device)
