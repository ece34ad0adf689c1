"""Encodes the samples of one shard: threads decode images while the VAE works, and each distinct caption is encoded once.

Which images form a VAE batch depends on the shard's records alone, so encoding a shard again gives the same bits.
"""

import collections
import concurrent.futures
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline

from stepdistill.config import Data
from stepdistill.config.data import Kind
from stepdistill.data.buckets import Size, Sizes
from stepdistill.data.decode import BadSample, cover, read_caption
from stepdistill.data.records import Record
from stepdistill.data.shards import caption_bytes, size_name
from stepdistill.data.source import image_of
from stepdistill.data.synthesis import Synthesis
from stepdistill.images.latents import scaled
from stepdistill.models.network.conditioning import MASK, Conditioning
from stepdistill.models.network.encode import encode_prompts

_WORKERS = min(8, os.cpu_count() or 1)
_AHEAD = 32
_MAX_AT_ONCE, _PIXELS_AT_ONCE = 128, 2**20
_EXAMPLES = 3


@dataclass
class Bad:
    """Bad samples by kind: how many, and the error messages of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, message: str) -> None:
        """Counts one bad sample."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples.setdefault(kind, [])) < _EXAMPLES:
            self.examples[kind].append(message)

    def extend(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        """Adds the bad samples of another shard."""
        for kind, count in counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            first_examples = self.examples.setdefault(kind, [])
            first_examples += examples.get(kind, [])[: _EXAMPLES - len(first_examples)]

    @property
    def total(self) -> int:
        """Number of bad samples of all kinds."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """Such as "2 image_unreadable (a.png: not an image)", comma-separated, the most frequent kind first."""
        kinds = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {kind} ({self.examples[kind][0]})" for kind, count in kinds)


@dataclass(frozen=True)
class _Place:
    """Where a sample comes from.

    name    the record's name
    whole   (height, width) of the whole image
    corner  (top, left) of the crop
    """

    name: str
    caption: str
    whole: Size
    corner: tuple[int, int]


_Cut = tuple[_Place, np.ndarray]
_Broken = tuple[str, BadSample]


class Encoder:
    """Turns records into a shard's tensors.

    Args:
        pipeline: the teacher's pipeline without its U-Net.
        data: the config's `data` section.
        sizes: the sizes that images are cropped to.
        synthesis: draws the latents if the source has prompts only.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, data: Data, sizes: Sizes, synthesis: Synthesis | None = None
    ) -> None:
        self._pipeline, self._data, self._sizes, self._synthesis = pipeline, data, sizes, synthesis
        self._dtype = getattr(torch, data.dtype)

    def encode(self, records: Sequence[Record], *, first: int) -> tuple[dict[str, torch.Tensor], Bad]:
        """The shard's tensors and its bad samples; BadSample, with the sample's name, for a kind whose policy is "error".

        first: number of the first record in the whole stream; latents that the teacher draws take their noise from it.
        """
        if self._synthesis is not None:
            return self._synthesized(records, self._synthesis, first)
        bad = Bad()
        waiting: dict[Size, list[_Cut]] = defaultdict(list)
        done: dict[Size, list[tuple[_Place, torch.Tensor]]] = defaultdict(list)

        def flush(size: Size) -> None:
            group = waiting.pop(size)
            encoded = encode_pixels(self._pipeline, np.stack([pixels for _, pixels in group]))
            for (place, _), latent in zip(group, encoded, strict=True):
                if bool(latent.isfinite().all()):
                    done[size].append((place, latent.to(self._dtype)))
                else:
                    self._refuse(
                        BadSample("latent_not_finite", "the VAE's latent is not finite"), place.name, bad
                    )

        for outcome in self._cut(records):
            if isinstance(outcome[1], BadSample):
                self._refuse(outcome[1], outcome[0], bad)
                continue
            size = (outcome[1].shape[0], outcome[1].shape[1])
            waiting[size].append(outcome)
            if len(waiting[size]) == images_at_once(size[0] * size[1]):
                flush(size)
        for size in sorted(waiting):
            flush(size)
        places = [place for group in done.values() for place, _ in group]
        if not places:
            return {"captions": caption_bytes([])}, bad
        return self._tensors(done, *self._texts(places)), bad

    def _cut(self, records: Sequence[Record]) -> Iterator[_Cut | _Broken]:
        """Each record as its cropped image, or its name and error, in order; threads read up to _AHEAD records ahead."""

        def read(record: Record) -> _Cut | _Broken:
            try:
                caption = read_caption(record.read_caption())
                image = image_of(record, self._data)
            except BadSample as error:
                return record.name, error
            whole = (image.height, image.width)
            pixels, corner = cover(image, self._sizes.of(whole))
            return _Place(record.name, caption, whole, corner), pixels

        with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
            rest = iter(records)
            ahead = collections.deque(pool.submit(read, r) for r in itertools.islice(rest, _AHEAD))
            while ahead:
                outcome = ahead.popleft().result()
                ahead.extend(pool.submit(read, r) for r in itertools.islice(rest, 1))
                yield outcome

    def _refuse(self, error: BadSample, name: str, bad: Bad) -> None:
        if self._data.policy(error.kind) == "error":
            raise stopping(error.kind, f"{name}: {error}")
        bad.add(error.kind, f"{name}: {error}")

    def _synthesized(
        self, records: Sequence[Record], synthesis: Synthesis, first: int
    ) -> tuple[dict[str, torch.Tensor], Bad]:
        bad, size = Bad(), self._sizes.target
        places, numbers = [], []
        for number, record in enumerate(records, first):
            try:
                places.append(_Place(record.name, read_caption(record.read_caption()), size, (0, 0)))
                numbers.append(number)
            except BadSample as error:
                self._refuse(error, record.name, bad)
        if not places:
            return {"captions": caption_bytes([])}, bad
        captions, conditioning = self._texts(places)
        rows = torch.tensor([captions.index(place.caption) for place in places])
        latents = synthesis.latents(conditioning.rows(rows), numbers)
        for place, latent in zip(places, latents, strict=True):
            if not bool(latent.isfinite().all()):
                raise BadSample("latent_not_finite", f"{place.name}: the teacher's latent is not finite")
        done = {size: list(zip(places, latents.to(self._dtype), strict=True))}
        return self._tensors(done, captions, conditioning), bad

    def _texts(self, places: Sequence[_Place]) -> tuple[list[str], Conditioning]:
        """The distinct captions, sorted, and a row of conditioning for each."""
        captions = sorted({place.caption for place in places})
        conditioning = encode_prompts(self._pipeline, captions, image_size=self._sizes.target)
        return captions, replace(conditioning, captions=tuple(captions))

    def _tensors(
        self,
        done: dict[Size, list[tuple[_Place, torch.Tensor]]],
        captions: list[str],
        conditioning: Conditioning,
    ) -> dict[str, torch.Tensor]:
        row = {caption: number for number, caption in enumerate(captions)}
        tensors = {"captions": caption_bytes(captions), **text_tensors(conditioning, self._dtype)}
        for size, group in done.items():
            rows = [[row[place.caption], *place.whole, *place.corner] for place, _ in group]
            tensors[f"rows/{size_name(size)}"] = torch.tensor(rows, dtype=torch.int32)
            tensors[f"latents/{size_name(size)}"] = torch.stack([latent for _, latent in group])
        return tensors


def images_at_once(pixels: int) -> int:
    """How many images of so many pixels the VAE encodes at once."""
    return min(_MAX_AT_ONCE, max(1, _PIXELS_AT_ONCE // pixels))


def stopping(kind: Kind, message: str) -> BadSample:
    """The error that stops `prepare`, for a bad sample of a kind whose policy is "error"; `message` begins with the sample's
    name."""
    return BadSample(kind, f"{kind}: {message}; fix: repair it, or set data.on_bad.{kind}=skip")


def text_tensors(conditioning: Conditioning, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The text tensors of a shard, on the CPU; time ids are left out, as they depend on the image."""
    parts = {"encoder_hidden_states": conditioning.encoder_hidden_states, **conditioning.added_cond_kwargs}
    return {
        f"text/{name}": part.to("cpu", torch.uint8 if name == MASK else dtype).contiguous()
        for name, part in parts.items()
        if name != "time_ids"
    }


@torch.no_grad()
def encode_pixels(pipeline: DiffusionPipeline, pixels: np.ndarray) -> torch.Tensor:
    """uint8 images (B, H, W, 3) -> the VAE's scaled posterior means (B, C, h, w), float32 on the CPU."""
    vae = pipeline.vae
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(vae.device, torch.float32)
    latents = vae.encode((batch / 127.5 - 1.0).to(vae.dtype)).latent_dist.mean
    return scaled(vae, latents.float().cpu())
