"""The report's tables of images: same noise, seeds, LoRA scales, LoRAs at other step counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from stepdistill.images.image_grid import image_grid
from stepdistill.report.embedded_images import (
    EmbeddedImage,
    clipped,
    embedded,
    mosaic,
    open_images,
    row_folder,
)
from stepdistill.report.entries import Entry, image_order
from stepdistill.report.number_format import number, steps_text
from stepdistill.report.read import Run

_SHOWN, _TILE = 96, 64
_PROMPT_LENGTH = 60
_MAX_PROMPTS, _MAX_TILES = 4, 4
_SHEET_TILE = 256


@dataclass(frozen=True)
class TileSizes:
    """Longest side in pixels to which large images are shrunk: in the same-noise grid, and in the other tables."""

    grid: int
    study: int


@dataclass(frozen=True)
class Tile:
    """A cell: an image (None if it is missing), a number below it, and whether the image is outlined."""

    image: EmbeddedImage | None
    note: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of images."""

    label: str
    kind: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Gallery:
    """A table of images. `prompts`: the full prompts of all columns if any heading is clipped, else empty."""

    caption: str
    corner: str
    columns: tuple[str, ...]
    strips: tuple[Strip, ...]
    are_prompts: bool = False
    prompts: tuple[str, ...] = ()
    is_study: bool = True


def same_noise(entries: Sequence[Entry], *, columns: int, sizes: TileSizes) -> Gallery | None:
    """The grid with the same prompt and noise in each column; None if no image exists."""
    prompts = _texts(entries[0].run.part("prompts") if entries else None)[:columns]
    strips = []
    for entry in image_order(entries):
        folder = row_folder(entry.run.path / "evaluation", entry.name)
        images = [open_images(folder, [k], longest=sizes.grid) if folder else [] for k in range(columns)]
        alts = [
            f"{entry.label}: {prompts[k] if k < len(prompts) else f'image {k + 1}'}" for k in range(columns)
        ]
        tiles = tuple(
            Tile(embedded(opened[0], alt, shown=_SHOWN) if opened else None)
            for opened, alt in zip(images, alts, strict=True)
        )
        if any(tile.image for tile in tiles):
            strips.append(Strip(entry.label, entry.kind, tiles))
    if not strips:
        return None
    headings = tuple(_clipped_prompt(p) for p in prompts) or tuple(str(k + 1) for k in range(columns))
    headings += ("",) * (columns - len(headings))
    caption = "Each column has one prompt and one initial noise: within a column only the model differs."
    return Gallery(caption, "model", headings, tuple(strips), bool(prompts), _unclipped(prompts), False)


def seeds(run: Run, *, sizes: TileSizes) -> Gallery | None:
    """A few prompts with several seeds each; a student whose images look alike has lost diversity. None if not drawn."""
    study = run.part("diversity_grid") or {}
    prompts, count = _texts(study.get("prompts"))[:_MAX_PROMPTS], int(number(study.get("seeds")) or 0)
    kinds = {row["row"]: row["kind"] for row in run.rows}
    strips = []
    for name in study.get("rows") or ():

        def draw(place: int, name: str = str(name)) -> Tile:
            indices = range(place * count, (place + 1) * count)
            alt = f"{name}, {count} seeds: {prompts[place]}"
            return _study_tile(run, ("seeds", name), indices, alt, sizes)

        strips.append(_strip(str(name), kinds.get(name, ""), range(len(prompts)), draw))
    caption = f"One prompt per column; each cell shows {count} seeds."
    headings = tuple(_clipped_prompt(p) for p in prompts)
    return _if_drawn(Gallery(caption, "model", headings, tuple(strips), True, _unclipped(prompts)))


def scale_sweep(run: Run, *, sizes: TileSizes) -> Gallery | None:
    """Every rung's LoRA at several scales; scale 1, as trained, is outlined. None if not drawn."""
    study = run.part("scale_sweep") or {}
    scales = [float(s) for s in study.get("scales") or () if number(s) is not None]
    cells = {(c.get("row"), c.get("scale")): c for c in study.get("cells") or ()}
    strips = []
    for name in dict.fromkeys(str(row) for row, _ in cells):

        def draw(place: int, name: str = name) -> Tile:
            scale = scales[place]
            tile = _study_tile(
                run,
                ("scales", f"{name}@{scale:g}"),
                range(_MAX_TILES),
                f"{name} at LoRA scale {scale:g}",
                sizes,
            )
            return Tile(tile.image, _mse(cells.get((name, scale))), scale == 1)

        strips.append(_strip(name, "student", range(len(scales)), draw))
    caption = "Each rung's LoRA at several scales, with the latent MSE to the teacher below. Outlined: scale 1, as trained."
    return _if_drawn(Gallery(caption, "LoRA", tuple(f"scale {s:g}" for s in scales), tuple(strips)))


def matrix(run: Run, *, sizes: TileSizes) -> Gallery | None:
    """Every rung's LoRA sampled with every rung's step count; the trained step count is outlined. None if not drawn."""
    study = run.part("matrix") or {}
    cells = {(c.get("adapter"), c.get("steps")): c for c in study.get("cells") or ()}
    steps = sorted({m for _, m in cells if isinstance(m, int)}, reverse=True)
    adapters = sorted({n for n, _ in cells if isinstance(n, int)}, reverse=True)
    strips = []
    for adapter in adapters:

        def draw(place: int, adapter: int = adapter) -> Tile:
            sampled, alt = steps[place], f"the {adapter}-step LoRA sampled at {steps[place]} steps"
            tile = _study_tile(run, ("matrix", f"{adapter}@{sampled}"), range(_MAX_TILES), alt, sizes)
            return Tile(tile.image, _mse(cells.get((adapter, sampled))), adapter == sampled)

        strips.append(_strip(f"{adapter}-step LoRA", "student", range(len(steps)), draw))
    caption = (
        "Each rung's LoRA sampled with each rung's step count, with the latent MSE to the teacher below. "
        "Outlined: the step count that the LoRA was trained for."
    )
    return _if_drawn(Gallery(caption, "LoRA", tuple(steps_text(m) for m in steps), tuple(strips)))


def comparison_sheet(entries: Sequence[Entry], *, columns: int) -> Image.Image | None:
    """grid.png: the same-noise grid as one image; None if no image exists."""
    rows: dict[str, list[Image.Image]] = {}
    for entry in image_order(entries):
        folder = row_folder(entry.run.path / "evaluation", entry.name)
        images = open_images(folder, range(columns), longest=_SHEET_TILE) if folder else []
        if images:
            rows[entry.label.replace("-", " ")] = images
    return image_grid(rows, max_tile=_SHEET_TILE) if rows else None


def _study_tile(run: Run, parts: tuple[str, ...], indices: range, alt: str, sizes: TileSizes) -> Tile:
    folder = row_folder(run.path / "evaluation", *parts)
    images = open_images(folder, indices, longest=sizes.study) if folder else []
    return Tile(mosaic(images, alt, tile=_TILE) if images else None)


def _strip(label: str, kind: str, places: range, draw: Callable[[int], Tile]) -> Strip:
    return Strip(label, kind, tuple(draw(place) for place in places))


def _if_drawn(gallery: Gallery) -> Gallery | None:
    drawn = any(tile.image or tile.note for strip in gallery.strips for tile in strip.tiles)
    return gallery if drawn else None


def _mse(cell: dict[str, Any] | None) -> str:
    value = number((cell or {}).get("latent_mse_to_teacher"))
    return "" if value is None else f"{value:.4f}"


def _texts(value: Any) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else []


def _clipped_prompt(prompt: str) -> str:
    return clipped(prompt, _PROMPT_LENGTH)


def _unclipped(prompts: Sequence[str]) -> tuple[str, ...]:
    """All prompts in full if any heading is clipped, else none."""
    return tuple(prompts) if any(len(p) > _PROMPT_LENGTH for p in prompts) else ()
