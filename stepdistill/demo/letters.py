"""The letters world: capital letters of real typefaces, in colour, with a caption that fixes part of each image.

A caption names the letter, the ink and the paper; typeface, angle, size and position vary. So a distilled model can fail to
follow the prompt and can lose diversity, and a program can check both. An image depends on (caption, seed, index) alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INKS = {
    "red": (205, 40, 40),
    "green": (30, 130, 60),
    "blue": (40, 70, 200),
    "black": (20, 20, 20),
    "purple": (130, 40, 150),
}
PAPERS = {
    "white": (255, 255, 255),
    "yellow": (250, 220, 90),
    "pink": (250, 175, 200),
    "gray": (185, 185, 185),
}
# The TrueType files of matplotlib that draw A to Z as Latin capitals (cmsy10 has calligraphic ones, the rest none).
TYPEFACES = tuple(
    f"{name}.ttf"
    for name in (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
        *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
        *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
    )
)
IMAGE_SIZE = 32
_SUPERSAMPLING = 4
Item = TypeVar("Item")


@dataclass(frozen=True)
class Style:
    """The ranges of what a caption leaves open.

    typefaces   file names
    angle       radians, at most this much to either side
    cap_height  smallest and largest height of a capital letter, as shares of the image's side
    shift       at most this much along each axis, as a share of the image's side
    """

    typefaces: tuple[str, ...] = TYPEFACES
    angle: float = 0.2
    cap_height: tuple[float, float] = (0.60, 0.76)
    shift: float = 0.06


WORLD = Style()


@dataclass(frozen=True)
class Triple:
    """The content that a caption specifies: indices into LETTERS, INKS and PAPERS."""

    letter: int
    ink: int
    paper: int

    @property
    def caption(self) -> str:
        """The prompt, such as "a purple letter m on pink"."""
        ink, paper = list(INKS)[self.ink], list(PAPERS)[self.paper]
        return f"a {ink} letter {LETTERS[self.letter].lower()} on {paper}"


def all_triples() -> list[Triple]:
    """All 26 x 5 x 4 = 520 (letter, ink, paper) triples, in a fixed order."""
    return [
        Triple(letter, ink, paper)
        for letter in range(len(LETTERS))
        for ink in range(len(INKS))
        for paper in range(len(PAPERS))
    ]


def parse_caption(caption: str) -> Triple:
    """The triple that a caption describes; ValueError if the text is not a caption of this world."""
    words = caption.split()
    try:
        _, ink, _, letter, _, paper = words
        return Triple(LETTERS.index(letter.upper()), list(INKS).index(ink), list(PAPERS).index(paper))
    except ValueError:
        raise ValueError(
            f"not a caption of the letters world: {caption!r}; expected 'a INK letter X on PAPER', "
            f"INK one of {', '.join(INKS)}, PAPER one of {', '.join(PAPERS)}"
        ) from None


@functools.cache
def _typeface_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.cache
def _font(typeface: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_typeface_folder() / typeface), size)


def render(triple: Triple, *, generator: np.random.Generator, style: Style = WORLD) -> Image.Image:
    """One 32 x 32 RGB image of `triple`; typeface, angle, size and position are drawn from `generator` within `style`."""
    typeface = style.typefaces[generator.integers(len(style.typefaces))]
    angle = generator.uniform(-style.angle, style.angle)
    cap_height = generator.uniform(*style.cap_height) * IMAGE_SIZE * _SUPERSAMPLING
    shift = generator.uniform(-style.shift, style.shift, size=2) * IMAGE_SIZE * _SUPERSAMPLING

    side = IMAGE_SIZE * _SUPERSAMPLING
    place = (side / 2 + shift[0], side / 2 + shift[1])
    mask = glyph(LETTERS[triple.letter], typeface=typeface, cap_height=cap_height, place=place, side=side)
    mask = mask.rotate(np.degrees(angle), resample=Image.Resampling.BICUBIC)
    mask = mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    ink = Image.new("RGB", mask.size, list(INKS.values())[triple.ink])
    paper = Image.new("RGB", mask.size, list(PAPERS.values())[triple.paper])
    return Image.composite(ink, paper, mask)


def glyph(
    letter: str, *, typeface: str, cap_height: float, place: tuple[float, float], side: int
) -> Image.Image:
    """A mask of side x side pixels: a letter in a typeface whose capitals are cap_height pixels high, with its middle at
    `place`."""
    reference = _font(typeface, 128)
    top, bottom = reference.getbbox("H", anchor="ls")[1::2]
    font = _font(typeface, max(8, round(128 * cap_height / (bottom - top))))
    left, top, right, bottom = font.getbbox(letter, anchor="ls")
    mask = Image.new("L", (side, side), 0)
    origin = (place[0] - (left + right) / 2, place[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(origin, letter, font=font, fill=255, anchor="ls")
    return mask


def render_at(triple: Triple, *, seed: int, index: int, style: Style = WORLD) -> Image.Image:
    """Image number `index` of the stream `seed`; always the same, whatever was rendered before."""
    return render(triple, generator=np.random.default_rng([seed, index]), style=style)


def sample_triples(num_images: int, *, seed: int, among: Sequence[Triple] | None = None) -> list[Triple]:
    """`num_images` triples: shuffled passes over `among`, by default all 520, so that each triple comes equally often."""
    return shuffled_passes(all_triples() if among is None else among, num_images, seed=seed)


def shuffled_passes(items: Sequence[Item], count: int, *, seed: int) -> list[Item]:
    """`count` items: shuffled passes over all of them, so that each comes equally often."""
    generator = np.random.default_rng([seed, 0x7121])
    order: list[int] = []
    while len(order) < count:
        order.extend(generator.permutation(len(items)).tolist())
    return [items[i] for i in order[:count]]
