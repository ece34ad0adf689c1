"""The pairs world: two capital letters of real typefaces, each in its own ink, one beside or above the other on one paper.

A caption names both letters, their inks, how they stand to each other, and the paper: 135,200 captions, of which a training
set holds a part. So a model must bind each ink to its letter and each letter to its place, in combinations that it has not
seen, which a distilled model may lose although its images look right. An image depends on (caption, seed, index) alone.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stepdistill.demo.letters import INKS, LETTERS, PAPERS, TYPEFACES, glyph, shuffled_passes

IMAGE_SIZE = 48
PLACES = {"left of": ((0.26, 0.5), (0.74, 0.5)), "above": ((0.5, 0.26), (0.5, 0.74))}
"""How the first letter stands to the second, and the middles of both, as shares of the image's side."""
CHOICES = (len(LETTERS), len(INKS), len(LETTERS), len(INKS), len(PLACES), len(PAPERS))
"""How many values each field of a Pair has."""
_SUPERSAMPLING = 4
_ANGLE = 0.15  # radians, at most, to either side
_CAP_HEIGHT = (0.30, 0.38)  # of the image's side
_LARGEST = (
    0.38  # of the image's side, in width and height; a larger letter, such as a W or a Q, is drawn smaller
)
_SHIFT = 0.03  # of the image's side, at most, along each axis
_CAPTION = re.compile(
    rf"a ({'|'.join(INKS)}) letter ([a-z]) ({'|'.join(PLACES)}) a ({'|'.join(INKS)}) letter ([a-z]) on ({'|'.join(PAPERS)})"
)


@dataclass(frozen=True)
class Pair:
    """The content that a caption specifies: indices into LETTERS, INKS, PLACES and PAPERS."""

    letter: int
    ink: int
    other_letter: int
    other_ink: int
    place: int
    paper: int

    @property
    def caption(self) -> str:
        """The prompt, such as "a red letter a left of a blue letter k on gray"."""
        one, other = (
            f"a {list(INKS)[ink]} letter {LETTERS[letter].lower()}"
            for letter, ink in ((self.letter, self.ink), (self.other_letter, self.other_ink))
        )
        return f"{one} {list(PLACES)[self.place]} {other} on {list(PAPERS)[self.paper]}"


def all_pairs() -> list[Pair]:
    """All 26 x 5 x 26 x 5 x 2 x 4 = 135,200 pairs, in a fixed order."""
    return [Pair(*row) for row in itertools.product(*map(range, CHOICES))]


def parse_caption(caption: str) -> Pair:
    """The pair that a caption describes; ValueError if the text is not a caption of this world."""
    found = _CAPTION.fullmatch(caption)
    if found is None:
        raise ValueError(
            f"not a caption of the pairs world: {caption!r}; expected 'a INK letter X PLACE a INK letter Y on PAPER', "
            f"INK one of {', '.join(INKS)}, PLACE {' or '.join(PLACES)}, PAPER one of {', '.join(PAPERS)}"
        )
    ink, letter, place, other_ink, other_letter, paper = found.groups()
    inks = list(INKS)
    return Pair(
        LETTERS.index(letter.upper()),
        inks.index(ink),
        LETTERS.index(other_letter.upper()),
        inks.index(other_ink),
        list(PLACES).index(place),
        list(PAPERS).index(paper),
    )


def render(pair: Pair, *, generator: np.random.Generator) -> Image.Image:
    """One 48 x 48 RGB image of `pair`; typefaces, angles, sizes and positions are drawn from `generator`."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), list(PAPERS.values())[pair.paper])
    middles = list(PLACES.values())[pair.place]
    written = ((pair.letter, pair.ink), (pair.other_letter, pair.other_ink))
    for (letter, ink), middle in zip(written, middles, strict=True):
        typeface = TYPEFACES[generator.integers(len(TYPEFACES))]
        angle = generator.uniform(-_ANGLE, _ANGLE)
        cap_height = generator.uniform(*_CAP_HEIGHT) * side
        x, y = (side * (share + generator.uniform(-_SHIFT, _SHIFT)) for share in middle)
        mask = _fitting_glyph(
            LETTERS[letter], typeface=typeface, cap_height=cap_height, place=(x, y), side=side
        )
        mask = mask.rotate(np.degrees(angle), resample=Image.Resampling.BICUBIC, center=(x, y))
        mask = mask.resize(image.size, Image.Resampling.BOX)
        image.paste(Image.new("RGB", image.size, list(INKS.values())[ink]), mask=mask)
    return image


def _fitting_glyph(
    letter: str, *, typeface: str, cap_height: float, place: tuple[float, float], side: int
) -> Image.Image:
    """The glyph, smaller if it would be larger than _LARGEST."""
    mask = glyph(letter, typeface=typeface, cap_height=cap_height, place=place, side=side)
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    size = max(right - left, bottom - top)
    if size <= _LARGEST * side:
        return mask
    smaller = cap_height * _LARGEST * side / size
    return glyph(letter, typeface=typeface, cap_height=smaller, place=place, side=side)


def render_at(pair: Pair, *, seed: int, index: int) -> Image.Image:
    """Image number `index` of the stream `seed`; always the same, whatever was rendered before."""
    return render(pair, generator=np.random.default_rng([seed, index]))


def sample_pairs(num_images: int, *, seed: int, among: Sequence[Pair] | None = None) -> list[Pair]:
    """`num_images` pairs: shuffled passes over `among`, by default all of them."""
    return shuffled_passes(all_pairs() if among is None else among, num_images, seed=seed)
