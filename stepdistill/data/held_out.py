"""Which captions are held out from training, so that the evaluation can use them.

A hash of the caption's text decides, so every seed, run and method holds out the same captions. The default share is 5 % for
images of your own if that holds out at least 64 distinct captions, else none.
"""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from stepdistill.config import Data, RunConfig
from stepdistill.data.decode import BadSample, read_caption
from stepdistill.data.records import Record, is_cache, is_prompts_only, records
from stepdistill.demo.world import world_of
from stepdistill.disk.durable import read_sealed
from stepdistill.run.folder import saved_held_out

AUTO_SHARE = 0.05
MIN_HELD_OUT_CAPTIONS = 64
"""The default share is used only if it holds out this many distinct captions; a source needs about 1,280 for that."""
MAX_LOOKED_AT = 5120
"""Records that are read to choose the default share. If they have too few distinct captions, the source repeats captions,
and holding some out would remove whole subjects from training."""
_MAX_HELD_OUT_SHARE = 4 * AUTO_SHARE  # share of the images; many of them may share one held-out caption


def is_held_out(caption: str, share: float) -> bool:
    """Whether a caption belongs to the share (0 to 1) of all texts that is held out."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def is_record_held_out(record: Record, share: float) -> bool:
    """Whether a record's caption is held out; False for a caption that cannot be read."""
    try:
        return is_held_out(read_caption(record.read_caption()), share)
    except BadSample:
        return False


def held_out_share(data: Data) -> float:
    """The share (0 to 1) of captions to hold out: data.held_out, or its default.

    Default: for another run's cache, the share that the cache was made with; for images of your own, AUTO_SHARE if
    `leaves_enough`, else 0; for the demo's worlds and for prompts only, 0.
    """
    if data.held_out is not None:
        return data.held_out
    if world_of(data.source) is not None or is_prompts_only(data.source):
        return 0.0
    if is_cache(data.source):
        return _prepared_with(Path(data.source).expanduser()) or 0.0
    return AUTO_SHARE if leaves_enough(records(data.source)) else 0.0


def settled(config: RunConfig) -> RunConfig:
    """The config with a number for data.held_out. A run that has begun keeps its share, even if its source grows."""
    share = config.data.held_out
    if share is None and not is_cache(config.data.source):
        begun = saved_held_out(config.run_dir)
        share = begun if begun is not None else _prepared_with(config.run_dir / "cache")
    if share is None:
        share = held_out_share(config.data)
    return config.model_copy(update={"data": config.data.model_copy(update={"held_out": share})})


def measured_data(config: RunConfig) -> Data:
    """The data that the evaluation uses, with a number for held_out.

    If data.source is another run's cache: the source which that cache was made from, if it held captions out and still
    exists; otherwise the cache's captions, all of which were trained on.
    """
    return _lenders(settled(config).data)


def _lenders(data: Data) -> Data:
    lender = _lender_of(data) if data.held_out else None
    if lender is not None:
        return _lenders(lender)
    return data.model_copy(update={"held_out": 0.0}) if is_cache(data.source) else data


def source_data(config: RunConfig) -> Data:
    """The data that the run's latents were encoded from, with a number for held_out.

    If data.source is another run's cache: the source which that cache was made from, if it still exists; otherwise the cache
    itself, which has no images.
    """
    data = settled(config).data
    while (lender := _lender_of(data)) is not None:
        data = lender
    return data


def _lender_of(data: Data) -> Data | None:
    """The `data` section that another run's cache was made from; None if data.source is not a cache, or its source no
    longer exists."""
    if not is_cache(data.source):
        return None
    lender = (read_sealed(Path(data.source).expanduser() / "manifest.json") or {}).get("data")
    source = str(lender.get("source") or "") if isinstance(lender, dict) else ""
    if world_of(source) is None and not (source and Path(source).expanduser().exists()):
        return None
    try:
        return Data.model_validate(lender)
    except ValidationError:  # written by another version
        return None


def _prepared_with(cache: Path) -> float | None:
    """The share of captions that a cache was made with; None if there is no cache."""
    data = (read_sealed(cache / "manifest.json") or {}).get("data")
    return data.get("held_out") if isinstance(data, dict) else None


def leaves_enough(stream: Iterable[Record]) -> bool:
    """Whether AUTO_SHARE holds out at least MIN_HELD_OUT_CAPTIONS distinct captions but not too many of the images.

    Reads at most MAX_LOOKED_AT records and stops as soon as enough captions are found.
    """
    captions: set[str] = set()
    held_out = 0
    for seen, record in enumerate(itertools.islice(stream, MAX_LOOKED_AT), 1):
        if not is_record_held_out(record, AUTO_SHARE):
            continue
        held_out += 1
        captions.add(read_caption(record.read_caption()))
        if len(captions) >= MIN_HELD_OUT_CAPTIONS:
            return held_out <= _MAX_HELD_OUT_SHARE * seen
    return False
