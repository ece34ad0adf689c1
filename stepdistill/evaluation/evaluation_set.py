"""The evaluation set: prompts, and the real images that the `*_to_real` metrics compare with.

Prompts come from a file, or are captions of the run's data: the held-out ones if there are any (data/held_out.py). Real
images come from a folder, are new renderings of the prompts (worlds of the demo), or are the data's own images of these
captions.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stepdistill.config import ConfigError, Data, RunConfig
from stepdistill.data.decode import BadSample
from stepdistill.data.held_out import measured_data
from stepdistill.data.records import IMAGE_SUFFIXES, is_cache, is_prompts_only
from stepdistill.data.source import (
    CaptionedImage,
    evaluation_captions,
    evaluation_images,
    measured_captions,
    not_empty,
    stacked,
    training_images,
)
from stepdistill.demo.world import World, world_of, world_of_captions
from stepdistill.disk.durable import sha256_json
from stepdistill.messages import first_line
from stepdistill.rng import derive_seed
from stepdistill.teacher.files import require_file
from stepdistill.teacher.source import teacher_facts

MIN_IMAGES = 8
"""The smallest allowed evaluation.num_images; coverage looks at 5 neighbours, so it needs more than 5."""


@dataclass(frozen=True)
class Renderings:
    """Real images that a world renders on demand, one for each caption."""

    world: World
    captions: tuple[str, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def about(self) -> str:
        """Description for the protocol."""
        return f"{len(self.captions)} renderings of the prompts"

    @property
    def key(self) -> str:
        """Identifies the images: equal keys mean equal images."""
        return sha256_json(["renderings", self.captions, self.seed])

    def batches(self, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W)."""
        images = (
            np.asarray(self.world.image(caption, seed=self.seed, index=k))
            for k, caption in enumerate(self.captions)
        )
        return stacked(images, batch_size)


@dataclass(frozen=True)
class ImageFolder:
    """The images in a folder and its subfolders, sorted by path."""

    folder: Path
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def open(cls, folder: str) -> "ImageFolder":
        """The images of `folder`; ConfigError if it has fewer than MIN_IMAGES or does not exist."""
        path = Path(folder)
        files = tuple(
            sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        )
        if len(files) < MIN_IMAGES:
            has = f"holds {len(files)} images" if path.exists() else "does not exist"
            raise ConfigError(
                f"evaluation.real_images: got {folder!r}, which {has}; "
                f"allowed: a folder with {MIN_IMAGES} or more of {', '.join(IMAGE_SUFFIXES)}"
            )
        return cls(path, files)

    def check(self) -> None:
        """ValueError if a file does not begin as an image does; the pixels are not read."""
        for file in self.files:
            try:
                with Image.open(file):
                    pass
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(_unreadable(file, error)) from None

    @property
    def about(self) -> str:
        """Description for the protocol."""
        return f"{len(self.files)} images of the folder {self.folder.name}"

    @property
    def key(self) -> str:
        """Identifies the images: sha256 over names and bytes, shortened to 16 hex digits."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.relative_to(self.folder).as_posix().encode() + b"\0")
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()[:16]

    def batches(self, batch_size: int = 64) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W); a new batch begins if the size changes."""
        return stacked((read_rgb(file) for file in self.files), batch_size)


@dataclass(frozen=True)
class DataImages:
    """Images of the run's own data.

    size  (height, width) that they are cropped to: the teacher's
    seen  whether they were trained on, in words
    """

    images: tuple[CaptionedImage, ...]
    size: tuple[int, int]
    seen: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def about(self) -> str:
        """Description for the protocol."""
        return f"{len(self.images)} images {self.seen}, {self.size[1]} x {self.size[0]}"

    @property
    def key(self) -> str:
        """Identifies the images: sha256 over bytes and size."""
        return sha256_json([*self.size, *(image.digest() for image in self.images)])

    def batches(self, batch_size: int = 64) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W)."""
        return stacked(self._usable(), batch_size)

    def _usable(self) -> Iterator[np.ndarray]:
        for image in self.images:
            with contextlib.suppress(BadSample):  # counted by `prepare`
                yield image.pixels(self.size)


RealImages = Renderings | ImageFolder | DataImages


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts of images 0 .. N - 1, the world that all prompts belong to, if any, and the real images, if any."""

    prompts: tuple[str, ...]
    world: World | None
    real: RealImages | None
    other_real: RealImages | None
    """A second set of real images; its distance to the first is the floor of the `*_to_real` metrics."""
    prompts_about: str
    """Where the prompts come from and whether they were trained on, for the protocol."""
    warnings: tuple[str, ...] = ()
    """Warnings about the real images, for the reader of the table."""


def evaluation_set_of(config: RunConfig) -> EvaluationSet:
    """The evaluation set of a config; ConfigError if a file is missing, empty or not UTF-8, or images are too few."""
    count, seed, data = config.evaluation.num_images, config.seed, measured_data(config)
    images: tuple[CaptionedImage, ...] = ()
    if config.evaluation.prompts is not None:
        lines = _read_prompts(Path(config.evaluation.prompts))
    elif (world := world_of(data.source)) is not None:
        among = measured_captions(world, data)
        lines = world.sample(count, seed=derive_seed(seed, "evaluation prompts") % 2**32, among=among)
    else:
        images = _own_images(config, data)
        captions = (caption for _, caption in evaluation_captions(data))
        lines = list(itertools.islice(captions, count))
        not_empty(data, len(lines))
    about = f"captions {_seen(data, len(lines))}" if config.evaluation.prompts is None else "a file's"
    prompts = tuple(lines[k % len(lines)] for k in range(count))
    world = world_of_captions(prompts)
    if config.evaluation.real_images is not None:
        return EvaluationSet(prompts, world, ImageFolder.open(config.evaluation.real_images), None, about)
    if images:
        size = teacher_facts(config).image_size
        real = DataImages(images, size, _seen(data, len(images)))
        if not data.held_out:
            return EvaluationSet(prompts, world, real, None, about, (_TRAINED_ON,))
        return EvaluationSet(prompts, world, real, _trained_on(data, count, size), about)
    if world is None:
        return EvaluationSet(prompts, None, None, None, about)
    first, second = (
        Renderings(world, prompts, derive_seed(seed, name) % 2**32) for name in ("real", "other real")
    )
    return EvaluationSet(prompts, world, first, second, about)


_TRAINED_ON = (
    "the real images were trained on, and the prompts are their captions: *_to_real, precision and coverage say nothing "
    "about unseen images; set data.held_out, or evaluation.prompts and evaluation.real_images, to measure with unseen ones"
)


def _trained_on(data: Data, count: int, size: tuple[int, int]) -> DataImages | None:
    """At most `count` images that were trained on; None if there are fewer than MIN_IMAGES."""
    seen = tuple(training_images(data, count=count))
    return DataImages(seen, size, "that were trained on") if len(seen) >= MIN_IMAGES else None


def _own_images(config: RunConfig, data: Data) -> tuple[CaptionedImage, ...]:
    """The data's images that the evaluation uses; ConfigError if they are to be the real images and are too few."""
    images = tuple(evaluation_images(data))
    has_images = not (is_prompts_only(data.source) or is_cache(data.source))
    if has_images and config.evaluation.real_images is None and len(images) < MIN_IMAGES:
        raise ConfigError(
            f"data.held_out: got {data.held_out}, which leaves {len(images)} images of {data.source} to "
            f"measure with; allowed: a share that leaves {MIN_IMAGES} or more, or evaluation.real_images"
        )
    return images


def _seen(data: Data, count: int) -> str:
    """Whether the `count` images or captions of the evaluation were trained on, in words."""
    if data.held_out:
        return "held out from training"
    whole = world_of(data.source) is not None or is_cache(data.source)
    if whole or data.num_images is None or data.num_images >= count:
        return "that were trained on"
    return f"of which the first {data.num_images:,} were trained on"


def _read_prompts(path: Path) -> list[str]:
    try:
        require_file(path)
    except ValueError as error:
        raise ConfigError(
            f"evaluation.prompts: {error}; allowed: a text file with one prompt per line"
        ) from None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluation.prompts: cannot read {path} as UTF-8 text: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(
            f"evaluation.prompts: {path} is empty; allowed: a text file with one prompt per line"
        )
    return prompts


def read_rgb(file: Path) -> np.ndarray:
    """The image as uint8 (H, W, 3); ValueError if the file cannot be read as one."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(_unreadable(file, error)) from None


def _unreadable(file: Path, error: Exception) -> str:
    return f"evaluation.real_images: cannot read {file}: {first_line(error)}; fix: another copy of it, or remove it"
