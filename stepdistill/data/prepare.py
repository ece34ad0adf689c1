"""Filling the cache: shards of consecutive samples, each made by one process, none made twice.

A shard depends on its own records, the teacher and the config alone: interrupted, `prepare` goes on at the first missing
one, and with any number of processes the files are the same to the byte.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config_data import KINDS
from stepdistill.data.buckets import Sizes
from stepdistill.data.cache import TEXT, pack
from stepdistill.data.encode import Bad, Encoder, stopping
from stepdistill.data.records import Record
from stepdistill.data.samples import BadSample, read_caption
from stepdistill.data.shards import FORMAT, is_intact, read_about, write_shard
from stepdistill.data.source import not_empty, training_records
from stepdistill.durable import canonical_safetensors, read_json, sha256_file, sha256_json, write_json
from stepdistill.models.conditioning import encode_prompts, encode_unconditional
from stepdistill.models.folder import resolve_model_folder
from stepdistill.models.loading import (
    encoder_fingerprint,
    fingerprint,
    image_size,
    load_encoders,
    size_multiple,
)
from stepdistill.rng import derive_seed
from stepdistill.runtime import Processes

logger = logging.getLogger(__name__)
SHARD = 1024
"""Samples a shard: a multiple of what the VAE encodes at once."""
_FREE = {"on_bad", "max_bad_fraction"}


def prepare(config: RunConfig) -> bool:
    """Fills the run's cache, each process its share of the shards; False where all of it was there.

    ValueError where a sample is bad of a kind that is to stop, too many are, or none is left: what was prepared stays.
    """
    work, processes = _Work(config), Processes()
    made = work.fill(processes)
    processes.wait()
    if processes.is_main:
        made = work.finish() or made
    processes.wait()
    return made


class _Work:
    """The filling of one cache."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._folder = config, config.run_dir / "cache"
        self._base = resolve_model_folder(config.teacher.path)
        self._sizes = Sizes(
            config.data, teacher_size=image_size(self._base), multiple=size_multiple(self._base)
        )
        data = config.data.model_dump(mode="json", exclude=_FREE)
        self._source = {
            "teacher": fingerprint(self._base),
            "encoders": encoder_fingerprint(self._base),
            "data": data,
            "seed": config.seed,
        }
        self._key = sha256_json([FORMAT, SHARD, self._source, self._sizes.all])
        self._encoder: Encoder | None = None
        self._bad, self._seen = Bad(), 0

    def fill(self, processes: Processes) -> bool:
        """Makes this process's missing shards."""
        made = False
        seed = derive_seed(self._config.seed, "data") % 2**32
        stream = training_records(self._config.data, seed=seed)
        (self._folder / "shards").mkdir(parents=True, exist_ok=True)
        self._count = 0
        while chunk := list(itertools.islice(stream, SHARD)):
            number, self._count = self._count, self._count + 1
            if number % processes.count == processes.index:
                made = self._shard(number, chunk, processes) or made
        return made

    def _shard(self, number: int, records: Sequence[Record], processes: Processes) -> bool:
        path = self._path(number)
        about = {"key": self._key, "index": str(number), "records": _digest(records)}
        found = read_about(path)
        there = found is not None and about.items() <= found.items() and is_intact(path)
        if not there:
            if self._encoder is None:
                pipeline = load_encoders(self._base, vae_dtype=getattr(torch, self._config.data.vae_dtype))
                self._encoder = Encoder(pipeline.to(processes.device), self._config.data, self._sizes)
            tensors, bad = self._encoder.encode(records)
            facts = {"bad": json.dumps([bad.counts, bad.examples], sort_keys=True), "seen": str(len(records))}
            write_shard(path, tensors, {**about, **facts, "dtype": self._config.data.dtype})
            found = read_about(path)
        assert found is not None
        self._bad.extend(*json.loads(found["bad"]))
        self._seen += int(found["seen"])
        self._stop_if_too_bad(final=False)
        if not there:
            logger.info("prepare: shard %d, %d samples", number, self._seen)
        return not there

    def finish(self) -> bool:
        """Previews' texts and the manifest, once all shards are there; False where both were there."""
        shards, self._bad, self._seen = [], Bad(), 0
        for number in range(self._count):
            about = read_about(self._path(number))
            if about is None or about["key"] != self._key:
                raise ValueError(f"{self._path(number)} is not there: another process stopped; run it again")
            self._bad.extend(*json.loads(about["bad"]))
            self._seen += int(about["seen"])
            shards.append({"file": f"shards/{self._path(number).name}", "sha256": about["sha256"]})
        self._stop_if_too_bad(final=True)
        prompts = list(dict.fromkeys(self._config.preview.prompts))
        manifest = {"format": FORMAT, "key": self._key, **self._source, "prompts": prompts, "shards": shards}
        manifest |= {"samples": self._seen - self._bad.total, "bad": self._bad.counts}
        manifest |= {"bad_examples": self._bad.examples}
        kept = read_json(self._folder / "manifest.json") or {}
        text = self._folder / TEXT
        for path in (self._folder / "shards").glob(".*.partial"):
            path.unlink()  # of a process that was killed
        same = {**kept, "text_sha256": None} == {**manifest, "text_sha256": None}
        if same and text.is_file() and sha256_file(text) == kept["text_sha256"]:
            return False
        self._write_text(text, prompts)
        write_json(self._folder / "manifest.json", {**manifest, "text_sha256": sha256_file(text)})
        for path in (self._folder / "shards").glob("*.safetensors"):
            if path.name not in {Path(entry["file"]).name for entry in shards}:
                path.unlink()  # of an earlier, longer source
        logger.info("prepare: %d samples in %d shards", manifest["samples"], len(shards))
        if self._bad.total:
            logger.warning("prepare: %d of %d samples left out: %s", self._bad.total, self._seen, self._bad)
        return True

    def _write_text(self, path: Path, prompts: list[str]) -> None:
        pipeline = load_encoders(self._base, vae_dtype=torch.float32)
        conditional = encode_prompts(pipeline, prompts, image_size=self._sizes.target)
        unconditional = encode_unconditional(pipeline, image_size=self._sizes.target)
        save_file({**pack("cond", conditional), **pack("uncond", unconditional)}, path)
        canonical_safetensors(path)

    def _stop_if_too_bad(self, *, final: bool) -> None:
        for kind in KINDS:  # of a shard made while this kind was still left out
            if self._bad.counts.get(kind) and self._config.data.policy(kind) == "error":
                raise stopping(kind, self._bad.examples[kind][0])
        allowed, seen = self._config.data.max_bad_fraction, self._seen if final else max(self._seen, SHARD)
        if self._bad.total > allowed * seen:
            raise ValueError(
                f"data.max_bad_fraction: {self._bad.total} of {self._seen} samples are bad, allowed: {allowed:g}: "
                f"{self._bad}; mend them or allow more; what was prepared stays"
            )
        if final:
            not_empty(self._config.data, self._seen)
        if final and self._bad.total == self._seen:
            raise ConfigError(
                f"data.source: got {self._config.data.source!r}, none of whose {self._seen} samples is usable: {self._bad}"
            )

    def _path(self, number: int) -> Path:
        return self._folder / "shards" / f"{number:05d}.safetensors"


def _digest(records: Sequence[Record]) -> str:
    """sha256 over names, captions and sizes: which records a shard was made of."""
    digest = hashlib.sha256()
    for record in records:
        try:
            caption = read_caption(record.read_caption())
        except BadSample as error:
            caption = f"\0{error.kind}"
        digest.update(json.dumps([record.name, caption, record.size]).encode() + b"\n")
    return digest.hexdigest()
