"""What a run is distilled on and measured with: captioned pictures, and the captions that distillation never sees.

letters    pictures of the letters world, rendered afresh from a seed
FOLDER     NAME.png (.jpg, .jpeg, .webp, .bmp) with NAME.txt beside it, in folders of any depth

A caption is held out by a hash of its own text, so every seed, run and method keeps the same ones apart.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from stepdistill.config import ConfigError, Data
from stepdistill.demo import letters

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_held_out(caption: str, share: float) -> bool:
    """Whether a caption belongs to the share (0 to 1) of all texts that distillation does not see."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture's file and its caption."""

    file: Path
    caption: str

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W, 3): the largest middle part of that shape, resized by Lanczos; ValueError names a bad file."""
        try:
            with Image.open(self.file) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the picture {self.file}: {error}") from None
        return np.asarray(ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS))


def read_folder(folder: str, *, key: str = "data.source") -> list[CaptionedPicture]:
    """The captioned pictures of a folder in order of their names; ConfigError for none, or one without a caption."""
    path = Path(folder)
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file())
    if not files:
        raise ConfigError(
            f'{key}: got {folder!r}, which holds no pictures; allowed: "letters", '
            f"or a folder with NAME.png (or {', '.join(PICTURE_SUFFIXES[1:])}) and NAME.txt"
        )
    found = []
    for file in files:
        text = file.with_suffix(".txt")
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: no caption for {file}: cannot read {text} as UTF-8: {error}") from None
        if not caption:
            raise ConfigError(f"{key}: no caption for {file}: {text} is empty")
        found.append(CaptionedPicture(file, caption))
    return found


def training_pictures(
    data: Data, *, size: tuple[int, int], seed: int, batch_size: int = 128
) -> tuple[list[str], Iterator[torch.Tensor]]:
    """Captions of the pictures that are trained on, and the pictures in the same order: uint8 (B, 3, H, W)."""
    if data.source == "letters":
        seen = [t for t in letters.all_triples() if not is_held_out(t.caption, data.held_out)]
        _not_empty(data, len(seen))
        triples = letters.sample_triples(data.num_images, seed=seed, among=seen)
        renders = (np.asarray(letters.render_at(t, seed=seed, index=i)) for i, t in enumerate(triples))
        return [t.caption for t in triples], stacked(renders, batch_size)
    pictures = [p for p in read_folder(data.source) if not is_held_out(p.caption, data.held_out)]
    _not_empty(data, len(pictures))
    pictures = pictures[: data.num_images]
    return [p.caption for p in pictures], stacked((p.pixels(size) for p in pictures), batch_size)


def evaluation_pictures(data: Data) -> list[CaptionedPicture]:
    """The pictures of a folder that the table is about: all, or where captions are held out those that have them."""
    pictures = read_folder(data.source)
    if data.held_out > 0:
        pictures = [p for p in pictures if is_held_out(p.caption, data.held_out)]
    _not_empty(data, len(pictures))
    return pictures


def evaluation_triples(data: Data) -> list[letters.Triple]:
    """The triples of the letters world that the table is about: all, or those held out."""
    triples = letters.all_triples()
    if data.held_out > 0:
        triples = [t for t in triples if is_held_out(t.caption, data.held_out)]
    _not_empty(data, len(triples))
    return triples


def _not_empty(data: Data, count: int) -> None:
    if not count:
        raise ConfigError(
            f"data.held_out: got {data.held_out}; allowed: a share that leaves pictures of {data.source} to train on "
            f"and, above 0, pictures to measure with"
        )


def stacked(pictures: Iterator[np.ndarray], batch_size: int) -> Iterator[torch.Tensor]:
    """(H, W, 3) arrays as (B, 3, H, W) tensors; a new batch begins where the size changes."""
    waiting: list[np.ndarray] = []
    for pixels in pictures:
        if waiting and (pixels.shape != waiting[0].shape or len(waiting) == batch_size):
            yield _tensor(waiting)
            waiting = []
        waiting.append(pixels)
    if waiting:
        yield _tensor(waiting)


def _tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
