"""Images of a run's folder as data URIs: small ones as PNG, enlarged without smoothing on the page; large ones as JPEG."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stepdistill.disk.durable import warn_of_damage
from stepdistill.images.image_grid import fitting
from stepdistill.run.image_chunks import image_digest, image_file, is_as_written

_SMALL = 64
_UNREADABLE = (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError)
_QUALITY = 85
_GAP = 2
_LONGEST_ALT = 160


@dataclass(frozen=True)
class EmbeddedImage:
    """An <img>: data URI, size on the page in CSS pixels, alt text, and whether it is shown enlarged."""

    uri: str
    width: int
    height: int
    alt: str
    enlarged: bool = False


def open_images(folder: Path, indices: Sequence[int], *, longest: int) -> list[Image.Image]:
    """Images of the folder's images/ by index, RGB, shrunk so that no side exceeds `longest` pixels.

    Missing or damaged images are left out, with a warning if the folder records that they were drawn or a file exists.
    """
    images = []
    for index in indices:
        image = _as_drawn(folder, index)
        if image is None:
            continue
        if max(image.size) > longest:
            image = image.resize(fitting(image.size, longest), Image.Resampling.LANCZOS)
        images.append(image)
    return images


def _as_drawn(folder: Path, index: int) -> Image.Image | None:
    file, digest = image_file(folder, index), image_digest(folder, index)
    changed = digest is not None and not is_as_written(file, digest)
    image = None if changed else opened(file)
    if image is None and (digest is not None or file.exists()):
        warn_of_damage(file, "it is left out of the report; fix: `stepdistill evaluate` draws it again")
    return image


def opened(file: Path) -> Image.Image | None:
    """The image as RGB; None if the file is missing or cannot be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except _UNREADABLE:
        return None


def row_folder(evaluation: Path, *parts: str) -> Path | None:
    """The folder evaluation/part/part/...; None if a part is not a plain name, such as ".."."""
    plain = all(part and part not in (".", "..") and not {"/", "\\", "\0"} & set(part) for part in parts)
    return evaluation.joinpath(*parts) if plain else None


def embedded(image: Image.Image, alt: str, *, shown: int) -> EmbeddedImage:
    """An image whose longer side is shown at about `shown` CSS pixels; a small one is enlarged by a whole factor."""
    small = max(image.size) <= _SMALL
    if small:
        scale = max(1, shown // max(image.size))
        width, height = image.width * scale, image.height * scale
    else:
        width, height = fitting(image.size, min(shown, max(image.size)))
    return EmbeddedImage(data_uri(image, lossless=small), width, height, clipped(alt), enlarged=small)


def mosaic(images: Sequence[Image.Image], alt: str, *, tile: int) -> EmbeddedImage:
    """Images of equal size in one grid with about as many rows as columns, each shown at about `tile` CSS pixels."""
    width, height = images[0].size
    columns = _columns(len(images))
    rows = -(-len(images) // columns)
    small = max(width, height) <= _SMALL
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    scale = max(1, tile // max(width, height)) if small else min(1, tile / max(width, height))
    shown = round(sheet.width * scale), round(sheet.height * scale)
    return EmbeddedImage(data_uri(sheet, lossless=small), *shown, clipped(alt), enlarged=small)


def _columns(count: int) -> int:
    """Number of columns: about as many as rows, chosen to leave no empty cell if possible."""
    square = next(n for n in range(1, count + 1) if n * n >= count)
    return next((n for n in range(square, square + 2) if count % n == 0), square)


def sheet(path: Path, alt: str, *, longest: int) -> EmbeddedImage | None:
    """A preview sheet, shrunk if a side exceeds `longest` pixels; None if it cannot be read."""
    image = opened(path)
    if image is None:
        warn_of_damage(path, "it is left out of the report")
        return None
    lossless = max(image.size) <= longest
    if not lossless:
        image = image.resize(fitting(image.size, longest), Image.Resampling.LANCZOS)
    return EmbeddedImage(data_uri(image, lossless=lossless), *image.size, clipped(alt))


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """The image as a data URI: PNG if lossless, else JPEG."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=_QUALITY)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def clipped(text: str, longest: int = _LONGEST_ALT) -> str:
    """The text as one line of at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"
