"""Counts a source's images by height and width, from their headers; the counts decide which buckets are used.

cache/tallies.json   the counts, and a hash of the records that were counted: an unchanged source is not counted again
"""

import concurrent.futures
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stepdistill.config import ConfigError, Data, RunConfig
from stepdistill.data.buckets import Size, Sizes, least_per_bucket
from stepdistill.data.decode import BadSample, read_caption, upright_size
from stepdistill.data.held_out import settled
from stepdistill.data.records import Record, is_cache, is_prompts_only
from stepdistill.data.shards import size_name
from stepdistill.data.source import training_records
from stepdistill.demo.world import world_of
from stepdistill.disk.durable import read_sealed, write_sealed
from stepdistill.messages import sizes_text
from stepdistill.rng import derive_seed
from stepdistill.runtime import Processes
from stepdistill.teacher.source import teacher_facts

TALLIES = "tallies.json"
COUNTED = 2000
"""Images whose headers `bucket_notes` reads before a run, in a second or two."""
_AT_ONCE = 256
_WORKERS = 8


@dataclass(frozen=True)
class UsedSizes:
    """The sizes that a run uses.

    sizes  what images are cropped to
    moved  number of images that are cropped to another size than that of the nearest aspect ratio
    """

    sizes: Sizes
    moved: int = 0


def all_sizes(config: RunConfig) -> Sizes:
    """The teacher's size, or every bucket if data.buckets is on."""
    teacher = teacher_facts(config)
    return Sizes(config.data, teacher_size=teacher.image_size, multiple=teacher.size_multiple)


def has_ratios(config: RunConfig) -> bool:
    """Whether data.buckets applies: the source has image files, which may differ in aspect ratio."""
    source = config.data.source
    return config.data.buckets and not (
        world_of(source) is not None or is_prompts_only(source) or is_cache(source)
    )


def used_sizes(config: RunConfig, processes: Processes) -> UsedSizes:
    """The sizes that enough images are cropped to; the main process counts them, the others read its file."""
    sizes = all_sizes(config)
    if not has_ratios(config):
        return UsedSizes(sizes)
    tally: Counter[Size] = Counter()
    for turn in (True, False):
        if processes.is_main == turn:
            tally = training_tally(config.run_dir / "cache", config.data, seed=data_seed(config))
        processes.wait()
    return without_small(sizes, tally, least=least_per_bucket(config))


def without_small(sizes: Sizes, tally: Counter[Size], *, least: int) -> UsedSizes:
    """`sizes` without those that fewer than `least` of the images in `tally` are cropped to."""
    used = sizes.without_small(tally, least=least)
    return UsedSizes(used, sum(n for size, n in tally.items() if used.of(size) != sizes.of(size)))


def data_seed(config: RunConfig) -> int:
    """The seed of the images of a demo's world."""
    return derive_seed(config.seed, "data") % 2**32


def bucket_notes(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yields (message, remedy) about the sizes that the first COUNTED images are cropped to; remedy may be "".

    Yields nothing if data.buckets does not apply, or the teacher's folder does not exist yet.
    """
    if not has_ratios(config):
        return
    try:
        sizes = all_sizes(config)
    except ConfigError:
        return
    stream = training_records(settled(config).data, seed=data_seed(config))
    tally = tally_images(itertools.islice(stream, COUNTED), config.data)
    is_whole, least = next(stream, None) is None, least_per_bucket(config)
    used = without_small(sizes, tally, least=least if is_whole else 1)
    counts = {size_name(size): count for size, count in used.sizes.tally(tally).items()}
    if counts:
        which = "all" if is_whole else "the first"
        yield f"{which} {tally.total():,} images are cut to {sizes_text(counts)}", ""
    if used.moved:
        yield (
            f"{used.moved:,} images are cut to another ratio, as fewer than {least:,} have their own",
            "more images of those ratios, or smaller updates; data.min_per_bucket=1 keeps every ratio, but an update of a "
            "rare ratio repeats the same few images many times",
        )


def tally_images(records: Iterable[Record], data: Data) -> Counter[Size]:
    """Number of images by (height, width); an image is left out if its header or caption is bad."""
    tally: Counter[Size] = Counter()
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        for some in _batches(records):
            tally.update(size for size in pool.map(lambda record: _size(record, data), some) if size)
    return tally


def training_tally(folder: Path, data: Data, *, seed: int) -> Counter[Size]:
    """`tally_images` of the training records, read from `folder` if the same records were counted before."""
    digest = hashlib.sha256()
    for record in training_records(data, seed=seed):
        digest.update(json.dumps([record.name, record.version()], allow_nan=False).encode() + b"\n")
    asked = {"records": digest.hexdigest(), "min_side": data.min_side, "max_pixels": data.max_pixels}
    stored = read_sealed(folder / TALLIES) or {}
    images = stored.get("pictures")
    if asked.items() <= stored.items() and isinstance(images, list):
        return Counter({(height, width): count for height, width, count in images})
    tally = tally_images(training_records(data, seed=seed), data)
    images = [[*size, count] for size, count in sorted(tally.items())]
    write_sealed(folder / TALLIES, {**asked, "pictures": images})
    return tally


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    rest = iter(records)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield some


def _size(record: Record, data: Data) -> Size | None:
    assert record.read_image is not None, "a source of prompts only has no images"
    try:
        read_caption(record.read_caption())
        content = record.read_image()
        if isinstance(content, Image.Image):
            return content.height, content.width
        return upright_size(content, max_pixels=data.max_pixels, min_side=data.min_side)
    except BadSample:
        return None
