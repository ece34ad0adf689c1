"""Pictures in rows on one sheet: one label per row, one column per prompt."""

from PIL import Image, ImageDraw, ImageFont

_MIN_TILE = 64
_GAP = 2


def image_grid(rows: dict[str, list[Image.Image]], *, max_tile: int | None = None) -> Image.Image:
    """A white sheet with a row of equal tiles per label; tiles under 64 pixels are enlarged without smoothing, those
    over `max_tile` shrunk."""
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
    sheet = Image.new(
        "RGB", (margin + columns * (tile[0] + _GAP), len(rows) * (tile[1] + _GAP) + _GAP), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows.items()):
        top = _GAP + y * (tile[1] + _GAP)
        pen.text((6, top + tile[1] / 2), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            sheet.paste(image.convert("RGB").resize(tile, filter_), (margin + x * (tile[0] + _GAP), top))
    return sheet


def fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size whose longer side is `longest`, in the same proportions."""
    width, height = size
    share = longest / max(size)
    return max(1, round(width * share)), max(1, round(height * share))
