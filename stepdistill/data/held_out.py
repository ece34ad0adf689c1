"""Which captions distillation never sees, so that the table can be about them.

A caption is held out by a hash of its own text, so every seed, run and method keeps the same ones apart. Where the config
names no share, it is 5 % of one's own pictures if that leaves 64 to measure with, else none.
"""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from stepdistill.config import Data, RunConfig
from stepdistill.data.records import Record, is_cache, is_prompts_only, records
from stepdistill.data.samples import BadSample, read_caption
from stepdistill.demo.world import world_of
from stepdistill.disk.durable import read_sealed
from stepdistill.run.folder import saved_held_out

AUTO_SHARE = 0.05
FEWEST_HELD_OUT = 64
"""Distinct captions that the share of its own must hold out: of about 1,280."""
MOST_LOOKED_AT = 5120
"""Records; a source with fewer captions among these repeats them, and whole subjects would be held out."""
_MOST_HELD_OUT = 4 * AUTO_SHARE  # of the pictures: one caption that many share may be among those held out


def is_held_out(caption: str, share: float) -> bool:
    """Whether a caption belongs to the share (0 to 1) of all texts that distillation does not see."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def is_record_held_out(record: Record, share: float) -> bool:
    """Whether a record's caption belongs to the share; a caption that cannot be read does not."""
    try:
        return is_held_out(read_caption(record.read_caption()), share)
    except BadSample:
        return False


def held_out_share(data: Data) -> float:
    """The share (0 to 1) that a config names, or what stands for none: the lender's of another run's cache, AUTO_SHARE of
    enough pictures of one's own, 0 of the letters world, of prompts alone and of fewer."""
    if data.held_out is not None:
        return data.held_out
    if world_of(data.source) is not None or is_prompts_only(data.source):
        return 0.0
    if is_cache(data.source):
        return _prepared_with(Path(data.source).expanduser()) or 0.0
    return AUTO_SHARE if leaves_enough(records(data.source)) else 0.0


def settled(config: RunConfig) -> RunConfig:
    """The config with a number for data.held_out: a run that has begun stays with its own, however its source grows."""
    share = config.data.held_out
    if share is None and not is_cache(config.data.source):
        begun = saved_held_out(config.run_dir)
        share = begun if begun is not None else _prepared_with(config.run_dir / "cache")
    if share is None:
        share = held_out_share(config.data)
    return config.model_copy(update={"data": config.data.model_copy(update={"held_out": share})})


def measured_data(config: RunConfig) -> Data:
    """The data that the table is about, its share a number: of another run's cache the lender's source, where that held
    captions out and is still there; else the cache's captions, which were all trained on."""
    return _lenders(settled(config).data)


def _lenders(data: Data) -> Data:
    lender = _lender_of(data) if data.held_out else None
    if lender is not None:
        return _lenders(lender)
    return data.model_copy(update={"held_out": 0.0}) if is_cache(data.source) else data


def pictured_data(config: RunConfig) -> Data:
    """The data that a run's latents were made of, its share a number: of another run's cache the lender's, where its source
    is still there; else the cache itself, which has no pictures."""
    data = settled(config).data
    while (lender := _lender_of(data)) is not None:
        data = lender
    return data


def _lender_of(data: Data) -> Data | None:
    """What the cache of another run was made of, where that is still there."""
    if not is_cache(data.source):
        return None
    lender = (read_sealed(Path(data.source).expanduser() / "manifest.json") or {}).get("data")
    source = str(lender.get("source") or "") if isinstance(lender, dict) else ""
    if world_of(source) is None and not (source and Path(source).expanduser().exists()):
        return None
    try:
        return Data.model_validate(lender)
    except ValidationError:  # of another version
        return None


def _prepared_with(cache: Path) -> float | None:
    """The share that a cache was made with; None where there is no cache."""
    data = (read_sealed(cache / "manifest.json") or {}).get("data")
    return data.get("held_out") if isinstance(data, dict) else None


def leaves_enough(stream: Iterable[Record]) -> bool:
    """Whether AUTO_SHARE of these records is FEWEST_HELD_OUT captions and no large part of the pictures; no more of them are
    read than it takes to know."""
    captions: set[str] = set()
    held_out = 0
    for seen, record in enumerate(itertools.islice(stream, MOST_LOOKED_AT), 1):
        if not is_record_held_out(record, AUTO_SHARE):
            continue
        held_out += 1
        captions.add(read_caption(record.read_caption()))
        if len(captions) >= FEWEST_HELD_OUT:
            return held_out <= _MOST_HELD_OUT * seen
    return False
