"""The captioned samples that a run is trained on and evaluated with; held-out captions (held_out.py) are not trained on."""

import contextlib
import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from stepdistill.config import ConfigError, Data
from stepdistill.data.decode import BadSample, cover, decode_image, read_caption
from stepdistill.data.held_out import held_out_share, is_held_out, is_record_held_out
from stepdistill.data.records import Record, is_cache, is_prompts_only, records
from stepdistill.demo.world import World, world_of

MAX_IMAGES = 50_000
"""Most images of the run's own data that the evaluation uses as real images."""


def image_of(record: Record, data: Data) -> Image.Image:
    """The RGB image of a record; BadSample if it cannot be used."""
    assert record.read_image is not None, "a source of prompts only has no images"
    content = record.read_image()
    if isinstance(content, Image.Image):
        return content
    return decode_image(content, max_pixels=data.max_pixels, min_side=data.min_side)


def training_records(data: Data, *, seed: int) -> Iterator[Record]:
    """The records that are trained on, in a fixed order: at most data.num_images, without held-out captions.

    Records whose captions cannot be read are included; whoever reads them counts them as bad.
    """
    share = held_out_share(data)
    world = world_of(data.source)
    if world is not None:
        seen = [caption for caption in world.captions() if not is_held_out(caption, share)]
        not_empty(data, len(seen))
        captions = world.sample(data.num_images or world.num_images, seed=seed, among=seen)
        return (_of_world(world, caption, seed=seed, index=k) for k, caption in enumerate(captions))
    all_records = _going_round(data) if is_prompts_only(data.source) else records(data.source)
    not_held_out = (r for r in all_records if share == 0 or not is_record_held_out(r, share))
    return itertools.islice(not_held_out, data.num_images)


def _of_world(world: World, caption: str, *, seed: int, index: int) -> Record:
    def draw() -> Image.Image:
        return world.image(caption, seed=seed, index=index)

    return Record(f"{world.name}:{index}", lambda: caption, draw)


def _going_round(data: Data) -> Iterator[Record]:
    """The prompts; repeated without end if data.num_images is set, as it may ask for more than the file has."""
    for number in itertools.count():
        for record in records(data.source):
            yield record if not number else replace(record, name=f"{record.name}, time {number + 1}")
        if data.num_images is None:
            return


@dataclass(frozen=True)
class CaptionedImage:
    """A record with its caption, which has been read; the image has not."""

    record: Record
    caption: str
    data: Data

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W, 3): the largest centre crop of that aspect ratio, resized by Lanczos; BadSample if unusable."""
        return cover(image_of(self.record, self.data), size)[0]

    def digest(self) -> str:
        """sha256 of the image's bytes, or of the record's name if they cannot be read."""
        assert self.record.read_image is not None
        try:
            content = self.record.read_image()
        except BadSample:
            content = self.record.name.encode()
        return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()


def evaluation_captions(data: Data) -> Iterator[tuple[Record, str]]:
    """The records that the evaluation uses, with their captions: the held-out ones, or all if none are held out."""
    share = held_out_share(data)
    for record in records(data.source):
        try:
            caption = read_caption(record.read_caption())
        except BadSample:
            continue
        if share == 0 or is_held_out(caption, share):
            yield record, caption


def evaluation_images(data: Data) -> list[CaptionedImage]:
    """The images that the evaluation uses, at most MAX_IMAGES; empty if the source has only prompts or latents."""
    with_images = ((r, caption) for r, caption in evaluation_captions(data) if r.read_image is not None)
    images = [CaptionedImage(r, c, data) for r, c in itertools.islice(with_images, MAX_IMAGES)]
    if not (is_prompts_only(data.source) or is_cache(data.source)):
        not_empty(data, len(images))
    return images


def training_images(data: Data, *, count: int) -> list[CaptionedImage]:
    """At most `count` images that are trained on, without those whose caption cannot be read.

    A hash of the names chooses them, because neighbours in the source's order may show the same things.
    """
    chosen = heapq.nsmallest(count, training_records(data, seed=0), key=_by_name)
    images = []
    for record in chosen:
        with contextlib.suppress(BadSample):
            images.append(CaptionedImage(record, read_caption(record.read_caption()), data))
    return images


def _by_name(record: Record) -> bytes:
    return hashlib.sha256(record.name.encode()).digest()


def measured_captions(world: World, data: Data) -> list[str]:
    """The captions of a world that the evaluation uses: those held out, or all if none are."""
    share = held_out_share(data)
    captions = [caption for caption in world.captions() if share == 0 or is_held_out(caption, share)]
    not_empty(data, len(captions))
    return captions


def not_empty(data: Data, count: int) -> None:
    """ConfigError if data.held_out leaves no samples to train on, or none to evaluate with; `count`: how many it leaves."""
    if not count:
        raise ConfigError(
            f"data.held_out: got {held_out_share(data)}; allowed: a share that leaves images of {data.source} to train on "
            f"and, above 0, images to measure with"
        )


def stacked(images: Iterable[np.ndarray], batch_size: int) -> Iterator[torch.Tensor]:
    """Batches (B, 3, H, W) of (H, W, 3) arrays, B up to batch_size; a new batch begins if the size changes."""
    waiting: list[np.ndarray] = []
    for pixels in images:
        if waiting and (pixels.shape != waiting[0].shape or len(waiting) == batch_size):
            yield _tensor(waiting)
            waiting = []
        waiting.append(pixels)
    if waiting:
        yield _tensor(waiting)


def _tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
