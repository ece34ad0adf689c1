"""How many pictures a source has of each height and width, by their headers: what decides which buckets are used.

cache/tallies.json   the counts, and a sum over the records that were counted: an equal source is not read again
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
from stepdistill.data.held_out import settled
from stepdistill.data.records import Record, is_cache, is_prompts_only
from stepdistill.data.samples import BadSample, picture_size, read_caption
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
"""Pictures whose headers are read before a run, in a second or two."""
_AT_ONCE = 256
_WORKERS = 8


@dataclass(frozen=True)
class UsedSizes:
    """sizes: what pictures are cut to; moved: how many are cut to another size than the nearest to their own ratio."""

    sizes: Sizes
    moved: int = 0


def all_sizes(config: RunConfig) -> Sizes:
    """The teacher's, or every bucket."""
    teacher = teacher_facts(config)
    return Sizes(config.data, teacher_size=teacher.image_size, multiple=teacher.size_multiple)


def has_ratios(config: RunConfig) -> bool:
    """Whether the source has pictures of its own ratios that are cut to several sizes."""
    source = config.data.source
    return config.data.buckets and not (
        world_of(source) is not None or is_prompts_only(source) or is_cache(source)
    )


def used_sizes(config: RunConfig, processes: Processes) -> UsedSizes:
    """The sizes that enough pictures fall into; one process counts them, the others read what it wrote."""
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
    """What is left of `sizes` for pictures of these heights and widths."""
    used = sizes.without_small(tally, least=least)
    return UsedSizes(used, sum(n for size, n in tally.items() if used.of(size) != sizes.of(size)))


def data_seed(config: RunConfig) -> int:
    """Of the letters world's pictures."""
    return derive_seed(config.seed, "data") % 2**32


def bucket_notes(config: RunConfig) -> Iterator[tuple[str, str]]:
    """How the first COUNTED pictures fall into sizes, by their headers, each line with a remedy where there is something to
    look at; nothing where pictures do not keep their ratios, or the teacher's folder is not made yet."""
    if not has_ratios(config):
        return
    try:
        sizes = all_sizes(config)
    except ConfigError:
        return
    stream = training_records(settled(config).data, seed=data_seed(config))
    tally = tally_pictures(itertools.islice(stream, COUNTED), config.data)
    is_whole, least = next(stream, None) is None, least_per_bucket(config)
    used = without_small(sizes, tally, least=least if is_whole else 1)
    counts = {size_name(size): count for size, count in used.sizes.tally(tally).items()}
    if counts:
        which = "all" if is_whole else "the first"
        yield f"{which} {tally.total():,} pictures are cut to {sizes_text(counts)}", ""
    if used.moved:
        yield (
            f"{used.moved:,} pictures are cut to the ratio of others, as fewer than {least:,} have their own",
            "more pictures of those ratios, or smaller updates; data.min_per_bucket=1 keeps the ratios, and an update of a "
            "rare one shows the same few pictures again and again",
        )


def tally_pictures(records: Iterable[Record], data: Data) -> Counter[Size]:
    """Pictures by (height, width); those that their header or caption shows to be bad are left out."""
    tally: Counter[Size] = Counter()
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        for some in _batches(records):
            tally.update(size for size in pool.map(lambda record: _size(record, data), some) if size)
    return tally


def training_tally(folder: Path, data: Data, *, seed: int) -> Counter[Size]:
    """`tally_pictures` of what is trained on, from `folder` where the same records were counted before."""
    digest = hashlib.sha256()
    for record in training_records(data, seed=seed):
        digest.update(json.dumps([record.name, record.version()]).encode() + b"\n")
    asked = {"records": digest.hexdigest(), "min_side": data.min_side, "max_pixels": data.max_pixels}
    stored = read_sealed(folder / TALLIES) or {}
    pictures = stored.get("pictures")
    if asked.items() <= stored.items() and isinstance(pictures, list):
        return Counter({(height, width): count for height, width, count in pictures})
    tally = tally_pictures(training_records(data, seed=seed), data)
    pictures = [[*size, count] for size, count in sorted(tally.items())]
    write_sealed(folder / TALLIES, {**asked, "pictures": pictures})
    return tally


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    rest = iter(records)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield some


def _size(record: Record, data: Data) -> Size | None:
    assert record.read_image is not None, "prompts alone have no pictures"
    try:
        read_caption(record.read_caption())
        content = record.read_image()
        if isinstance(content, Image.Image):
            return content.height, content.width
        return picture_size(content, max_pixels=data.max_pixels, min_side=data.min_side)
    except BadSample:
        return None
