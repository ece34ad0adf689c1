"""A world of pictures that can be drawn without end, and what the package asks of one.

`data.source` names a world by its name. Data and evaluation know no other fact of it than these answers; a caption says
everything about what its picture shows.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from PIL import Image

from stepdistill.demo import letters
from stepdistill.demo.reader import prompt_accuracy, shipped_reader


class World(Protocol):
    """The questions."""

    name: str
    num_images: int
    """How many pictures a run learns from where its config names no number."""
    extractor: str
    """The value of evaluation.features that measures its pictures where the config names none."""

    def captions(self) -> list[str]:
        """All that there are."""

    def knows(self, caption: str) -> bool:
        """Whether a text is one of its captions."""

    def sample(self, count: int, *, seed: int, among: Sequence[str]) -> list[str]:
        """`count` of these captions: whole shuffled passes over them, so that each comes equally often."""

    def picture(self, caption: str, *, seed: int, index: int) -> Image.Image:
        """The picture number `index` of the stream `seed`: the same for ever, whatever was drawn before."""

    def accuracy(self, batches: Iterable[torch.Tensor], captions: Sequence[str]) -> float:
        """Share of uint8 pictures, in batches (B, 3, H, W), that show what the caption of the same number says."""


class LettersWorld:
    """Capital letters of real typefaces in an ink on a paper (letters.py), read by the reader that ships in the package."""

    name = "letters"
    num_images = 4096
    extractor = "reader"

    def captions(self) -> list[str]:
        """All 520."""
        return [triple.caption for triple in letters.all_triples()]

    def knows(self, caption: str) -> bool:
        """Such as "a red letter a on white"."""
        try:
            letters.parse_caption(caption)
        except ValueError:
            return False
        return True

    def sample(self, count: int, *, seed: int, among: Sequence[str]) -> list[str]:
        """The captions of letters.sample_triples."""
        triples = [letters.parse_caption(caption) for caption in among]
        return [triple.caption for triple in letters.sample_triples(count, seed=seed, among=triples)]

    def picture(self, caption: str, *, seed: int, index: int) -> Image.Image:
        """32 x 32, RGB."""
        return letters.render_at(letters.parse_caption(caption), seed=seed, index=index)

    def accuracy(self, batches: Iterable[torch.Tensor], captions: Sequence[str]) -> float:
        """Letter, ink and paper are all as the caption says."""
        return prompt_accuracy(batches, [*map(letters.parse_caption, captions)], reader=shipped_reader())


WORLDS: dict[str, World] = {"letters": LettersWorld()}


def world_of(source: str) -> World | None:
    """The world that a `data.source` names; None for files."""
    return WORLDS.get(source)


def world_of_captions(captions: Sequence[str]) -> World | None:
    """The world that all of these captions are of; None where there is none."""
    return next((world for world in WORLDS.values() if all(map(world.knows, captions))), None)
