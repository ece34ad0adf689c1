"""A grid of images: one row per label, one column per prompt."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MIN_TILE = 64
_GAP = 2
_HEADING, _LINE = 11, 14  # pixels


def image_grid(
    rows: dict[str, list[Image.Image]], *, max_tile: int | None = None, headings: Sequence[str] = ()
) -> Image.Image:
    """A white sheet with one row of equal tiles per label.

    Images under 64 pixels are enlarged without smoothing, images over `max_tile` are shrunk. `headings`: a text above
    each column, wrapped to its width.
    """
    width, height = next(iter(rows.values()))[0].size
    longest = max(width, height)
    if max_tile is not None and longest > max_tile:
        tile, filter_ = fitting((width, height), max_tile), Image.Resampling.LANCZOS
    else:
        scale = -(-_MIN_TILE // longest) if longest < _MIN_TILE else 1
        tile, filter_ = (width * scale, height * scale), Image.Resampling.NEAREST
    font = ImageFont.load_default(size=max(12, tile[1] // 5))
    margin = max(int(font.getlength(label)) for label in rows) + 12
    columns = max(len(images) for images in rows.values())
    small = ImageFont.load_default(size=_HEADING)
    broken = [textwrap.wrap(text, int(tile[0] / small.getlength("n"))) for text in headings]
    head = max(map(len, broken), default=0) * _LINE
    size = margin + columns * (tile[0] + _GAP), head + len(rows) * (tile[1] + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, lines in enumerate(broken):
        pen.multiline_text(
            (margin + x * (tile[0] + _GAP), 0), "\n".join(lines), fill="black", font=small, spacing=2
        )
    for y, (label, images) in enumerate(rows.items()):
        top = head + _GAP + y * (tile[1] + _GAP)
        pen.text((6, top + tile[1] / 2), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            sheet.paste(image.convert("RGB").resize(tile, filter_), (margin + x * (tile[0] + _GAP), top))
    return sheet


def fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` (width, height) scaled so that the longer side is `longest`, at the same aspect ratio."""
    width, height = size
    share = longest / max(size)
    return max(1, round(width * share)), max(1, round(height * share))
