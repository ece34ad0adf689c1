"""Worlds: sources that generate any number of captioned images, and the interface that the package uses them by.

`data.source` selects a world by its name. Data preparation and evaluation use a world through this interface only.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from PIL import Image

from stepdistill.demo import letters, pairs
from stepdistill.demo.reader import SHIPPED_READERS as SHIPPED_READERS
from stepdistill.demo.reader import load_reader as load_reader
from stepdistill.demo.reader import prompt_accuracy, shipped_reader
from stepdistill.demo.reader import reader_file as reader_file


class World(Protocol):
    """A source of generated images. Each caption describes its image completely enough to check the image."""

    name: str
    num_images: int
    """Number of training images if data.num_images is not set."""
    extractor: str
    """The default of evaluation.features for images of this world."""

    def captions(self) -> list[str]:
        """All captions of the world."""

    def knows(self, caption: str) -> bool:
        """Whether a text is a caption of the world."""

    def sample(self, count: int, *, seed: int, among: Sequence[str]) -> list[str]:
        """`count` captions: shuffled passes over `among`, so that each caption comes equally often."""

    def image(self, caption: str, *, seed: int, index: int) -> Image.Image:
        """Image number `index` of the stream `seed`; always the same, whatever was drawn before."""

    def readings(self, batches: Iterable[torch.Tensor]) -> list[str]:
        """The caption that each of the uint8 images, in batches (B, 3, H, W), shows."""

    def accuracy(self, batches: Iterable[torch.Tensor], captions: Sequence[str]) -> float:
        """Share of uint8 images, in batches (B, 3, H, W), that show what the caption of the same index describes."""


class LettersWorld:
    """Capital letters of real typefaces in an ink on a paper (letters.py), checked by the shipped reader."""

    name = "letters"
    num_images = 4096
    extractor = "reader"

    def captions(self) -> list[str]:
        """All 520 captions."""
        return [triple.caption for triple in letters.all_triples()]

    def knows(self, caption: str) -> bool:
        """Whether a text is a caption such as "a red letter a on white"."""
        try:
            letters.parse_caption(caption)
        except ValueError:
            return False
        return True

    def sample(self, count: int, *, seed: int, among: Sequence[str]) -> list[str]:
        """The captions of letters.sample_triples."""
        triples = [letters.parse_caption(caption) for caption in among]
        return [triple.caption for triple in letters.sample_triples(count, seed=seed, among=triples)]

    def image(self, caption: str, *, seed: int, index: int) -> Image.Image:
        """A 32 x 32 RGB image of the caption."""
        return letters.render_at(letters.parse_caption(caption), seed=seed, index=index)

    def readings(self, batches: Iterable[torch.Tensor]) -> list[str]:
        """The captions of the letters, inks and papers that the shipped reader sees."""
        reader = shipped_reader()
        return [triple.caption for batch in batches for triple in reader.read(batch)]

    def accuracy(self, batches: Iterable[torch.Tensor], captions: Sequence[str]) -> float:
        """Share of images whose letter, ink and paper all match the caption."""
        return prompt_accuracy(batches, [*map(letters.parse_caption, captions)], reader=shipped_reader())


class PairsWorld:
    """Two capital letters, each in its own ink, one beside or above the other on a paper (pairs.py), checked by the shipped
    reader of pairs."""

    name = "pairs"
    num_images = 16_384
    extractor = "pairs_reader"

    def captions(self) -> list[str]:
        """All 135,200 captions."""
        return [pair.caption for pair in pairs.all_pairs()]

    def knows(self, caption: str) -> bool:
        """Whether a text is a caption such as "a red letter a left of a blue letter k on gray"."""
        try:
            pairs.parse_caption(caption)
        except ValueError:
            return False
        return True

    def sample(self, count: int, *, seed: int, among: Sequence[str]) -> list[str]:
        """The captions of pairs.sample_pairs."""
        chosen = pairs.sample_pairs(
            count, seed=seed, among=[pairs.parse_caption(caption) for caption in among]
        )
        return [pair.caption for pair in chosen]

    def image(self, caption: str, *, seed: int, index: int) -> Image.Image:
        """A 48 x 48 RGB image of the caption."""
        return pairs.render_at(pairs.parse_caption(caption), seed=seed, index=index)

    def readings(self, batches: Iterable[torch.Tensor]) -> list[str]:
        """The captions of the letters, inks, places and papers that the shipped reader of pairs sees."""
        reader = shipped_reader("pairs_reader")
        return [pair.caption for batch in batches for pair in reader.read(batch)]

    def accuracy(self, batches: Iterable[torch.Tensor], captions: Sequence[str]) -> float:
        """Share of images whose letters, inks, place and paper all match the caption."""
        reader = shipped_reader("pairs_reader")
        return prompt_accuracy(batches, [*map(pairs.parse_caption, captions)], reader=reader)


WORLDS: dict[str, World] = {"letters": LettersWorld(), "pairs": PairsWorld()}


def world_of(source: str) -> World | None:
    """The world that a `data.source` names; None if it is a path."""
    return WORLDS.get(source)


def world_of_captions(captions: Sequence[str]) -> World | None:
    """The world that all of these captions belong to; None if there is no such world."""
    return next((world for world in WORLDS.values() if all(map(world.knows, captions))), None)
