"""Fills the cache: shards of consecutive samples, each encoded once, by one process.

A shard depends on its records, the teacher and the config alone. So after an interruption `prepare` continues with the
missing shards, and any number of processes writes the same bytes.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.data import KINDS
from stepdistill.data.buckets import least_per_bucket
from stepdistill.data.cache import TEXT, is_whole, pack
from stepdistill.data.decode import BadSample, read_caption
from stepdistill.data.encode import Bad, Encoder, stopping
from stepdistill.data.held_out import settled
from stepdistill.data.records import Record, is_cache, is_prompts_only
from stepdistill.data.shards import FORMAT, Shard, is_intact, read_about, size_name, write_shard
from stepdistill.data.size_counts import UsedSizes, data_seed, used_sizes
from stepdistill.data.source import not_empty, training_records
from stepdistill.data.synthesis import Synthesis
from stepdistill.disk.durable import (
    canonical,
    read_sealed,
    sha256_file,
    sha256_json,
    warn_of_damage,
    write_bytes,
    write_sealed,
    writing,
)
from stepdistill.disk.guarded_folder import make_folder
from stepdistill.disk.places import clear_half_written
from stepdistill.errors import DataError
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.experts import with_experts
from stepdistill.models.network.encode import encode_prompts, encode_unconditional
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import SharedNetwork
from stepdistill.runtime import WEIGHT_DTYPES, Processes
from stepdistill.teacher.experts import check_prompts, teachers_key
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import (
    encoder_fingerprint,
    fingerprint,
    load_encoders,
    load_noise_path,
)
from stepdistill.teacher.source import is_ready_made, made_folder, teacher_folder

logger = logging.getLogger(__name__)
SHARD = 1024
"""Samples per shard: a multiple of the VAE's largest batch."""
PROMPTS_A_SHARD = 64
"""Samples per shard if the teacher draws them, which is slow."""
_FREE = {"on_bad", "max_bad_fraction", "min_per_bucket"}
"""Keys of `data` that are left out of the shards' key. min_per_bucket changes only the sizes, which are part of the key."""


def prepare(config: RunConfig) -> bool:
    """Fills the run's cache, each process its share of the shards; False if the cache was already complete.

    ValueError if a sample is bad and the policy of its kind is "error", if too many samples are bad, or if none is usable.
    Shards that are already written stay.
    """
    config, processes = settled(config), Processes()
    builder = _CacheBuilder(config, used_sizes(config, processes))
    made = builder.fill(processes)
    processes.wait()
    if processes.is_main:
        made = builder.finish() or made
    processes.wait()
    return made


class _CacheBuilder:
    """Writes the missing shards of one cache, then its manifest."""

    def __init__(self, config: RunConfig, used: UsedSizes) -> None:
        self._config, self._sizes, self._moved = config, used.sizes, used.moved
        self._folder = config.run_dir / "cache"
        self._base = teacher_folder(config)
        data = config.data.model_dump(mode="json", exclude=_FREE)
        if config.data.text_dtype == "float32":  # as in caches of earlier versions, which do not name it
            del data["text_dtype"]
        self._source = {
            "teacher": fingerprint(self._base),
            "encoders": encoder_fingerprint(self._base),
            "data": data,
            "seed": config.seed,
        }
        self._per_shard = SHARD
        if is_prompts_only(config.data.source):
            self._per_shard = PROMPTS_A_SHARD
            made_by: list[Any] = [
                config.teacher.guidance_scale,
                config.teacher.unconditional,
                config.training.mixed_precision,
            ]
            if config.teachers:
                made_by.append(teachers_key(config))
            self._source |= {"made_by": made_by}
        self._key = sha256_json([FORMAT, self._per_shard, self._source, self._sizes.all])
        self._lender = Path(config.data.source).expanduser() if is_cache(config.data.source) else None
        self._borrowed: dict[str, Any] = {}
        if self._lender is not None:
            self._borrowed = borrowed_manifest(config, self._lender, self._source)
        self._encoder: Encoder | None = None
        self._bad, self._seen, self._count = Bad(), 0, 0

    def fill(self, processes: Processes) -> bool:
        """Writes the missing shards of this process; True if there were any."""
        made = False
        if self._lender is not None:
            return made
        stream = training_records(self._config.data, seed=data_seed(self._config))
        with writing(self._folder / "shards"):
            make_folder(self._folder / "shards")
        while chunk := list(itertools.islice(stream, self._per_shard)):
            number, self._count = self._count, self._count + 1
            if number % processes.count == processes.index:
                made = self._shard(number, chunk, processes) or made
        return made

    def _shard(self, number: int, records: Sequence[Record], processes: Processes) -> bool:
        path = self._path(number)
        about = {"key": self._key, "index": str(number), "records": _digest(records)}
        stored = read_about(path)
        fits = stored is not None and about.items() <= stored.items()
        is_done = fits and is_intact(path)
        if fits and not is_done:
            warn_of_damage(path, "it is made again")
        if not is_done:
            if self._encoder is None:
                self._encoder = self._make_encoder(processes.device)
            tensors, bad = self._encoder.encode(records, first=number * self._per_shard)
            left_out = json.dumps([bad.counts, bad.examples], sort_keys=True, allow_nan=False)
            facts = {"bad": left_out, "seen": str(len(records))}
            write_shard(path, tensors, {**about, **facts, "dtype": self._config.data.dtype})
            stored = read_about(path)
        assert stored is not None
        self._bad.extend(*json.loads(stored["bad"]))
        self._seen += int(stored["seen"])
        self._stop_if_too_bad(final=False)
        if not is_done:
            logger.info("prepare: shard %d, %d samples", number, self._seen)
        return not is_done

    @functools.cached_property
    def _pipeline(self) -> DiffusionPipeline:
        data = self._config.data
        vae, text = (getattr(torch, name) for name in (data.vae_dtype, data.text_dtype))
        return load_encoders(self._base, vae_dtype=vae, text_dtype=text)

    def _make_encoder(self, device: torch.device) -> Encoder:
        config = self._config
        pipeline, facts = self._pipeline.to(device), TeacherFacts.of_folder(self._base)
        if not is_prompts_only(config.data.source):
            return Encoder(pipeline, config.data, self._sizes)
        size, kind = self._sizes.target, config.teacher.unconditional
        dtype = WEIGHT_DTYPES[config.training.mixed_precision]
        noise_path, prediction_type = load_noise_path(facts.scheduler_at(size))
        unconditional = encode_unconditional(pipeline, image_size=size, kind=kind)
        unet = load_network(self._base, dtype=dtype).to(device)
        base = Denoiser(
            SharedNetwork(unet),
            None,
            noise_path.to(device),
            prediction_type,
            guidance_scale=config.teacher.guidance_scale,
            unconditional=unconditional.to(device, dtype),
        )
        synthesis = Synthesis(
            teacher=with_experts(base, config),
            steps=config.data.teacher_steps,
            shape=facts.latent_shape(size),
            seed=config.seed,
            batch_size=config.training.train_batch_size,
        )
        return Encoder(pipeline, config.data, self._sizes, synthesis)

    def finish(self) -> bool:
        """Writes the preview's text embeddings and the manifest, after all shards; False if both were up to date."""
        shards, self._bad, self._seen = [], Bad(), 0
        for number in range(self._count):
            about = read_about(self._path(number))
            if about is None or about["key"] != self._key:
                raise DataError(
                    f"{self._path(number)} was removed or replaced after it was written; fix: run the same command again"
                )
            self._bad.extend(*json.loads(about["bad"]))
            self._seen += int(about["seen"])
            shards.append({"file": f"shards/{self._path(number).name}", "sha256": about["sha256"]})
        if self._lender is not None:
            shards = [
                {**e, "file": str((self._lender / e["file"]).resolve())} for e in self._borrowed["shards"]
            ]
            self._seen = self._borrowed["samples"]
        self._stop_if_too_bad(final=True)
        prompts = list(dict.fromkeys(self._config.preview.prompts))
        manifest = {"format": FORMAT, "key": self._key, **self._source, "prompts": prompts, "shards": shards}
        manifest |= {"samples": self._seen - self._bad.total, "bad": self._bad.counts}
        manifest |= {"bad_examples": self._bad.examples, "unconditional": self._config.teacher.unconditional}
        manifest |= self._size_entries(shards)
        stored = read_sealed(self._folder / "manifest.json") or {}
        text = self._folder / TEXT
        clear_half_written(self._folder)
        same = {**stored, "text_sha256": None} == {**manifest, "text_sha256": None}
        if same and text.is_file() and sha256_file(text) == stored.get("text_sha256"):
            return False
        self._write_text(text, prompts)
        write_sealed(self._folder / "manifest.json", {**manifest, "text_sha256": sha256_file(text)})
        for path in (self._folder / "shards").glob("*.safetensors"):
            if path.name not in {Path(entry["file"]).name for entry in shards}:
                _remove(path)  # left over from a longer source
        logger.info("prepare: %d samples in %d shards", manifest["samples"], len(shards))
        if self._bad.total:
            logger.warning("prepare: %d of %d samples left out: %s", self._bad.total, self._seen, self._bad)
        return True

    def _size_entries(self, shards: list[dict[str, str]]) -> dict[str, Any]:
        """Manifest entries about image sizes: how many samples have each, and how many were cropped to another size than the
        nearest. Empty if all samples have one size and data.buckets is off."""
        counts: Counter[str] = Counter()
        for entry in shards:
            counts.update({size_name(s): n for s, n in Shard(self._folder / entry["file"]).counts.items()})
        if len(counts) < 2 and not self._config.data.buckets:
            return {}
        moved, least = self._moved, least_per_bucket(self._config)
        if self._lender is not None:
            moved, least = (self._borrowed.get(key, 0) for key in ("moved", "min_per_bucket"))
        return {"sizes": dict(sorted(counts.items())), "moved": moved, "min_per_bucket": least}

    def _write_text(self, path: Path, prompts: list[str]) -> None:
        pipeline = self._pipeline
        conditional = encode_prompts(pipeline, prompts, image_size=self._sizes.target)
        unconditional = encode_unconditional(
            pipeline, image_size=self._sizes.target, kind=self._config.teacher.unconditional
        )
        content = save({**pack("cond", conditional), **pack("uncond", unconditional)})
        write_bytes(path, canonical(content))

    def _stop_if_too_bad(self, *, final: bool) -> None:
        for kind in KINDS:  # in a stored shard, encoded while the policy of this kind was still "skip"
            if self._bad.counts.get(kind) and self._config.data.policy(kind) == "error":
                raise stopping(kind, self._bad.examples[kind][0])
        allowed = self._config.data.max_bad_fraction
        seen = self._seen if final else max(self._seen, self._per_shard)
        if self._bad.total > allowed * seen:
            raise DataError(
                f"data.max_bad_fraction: {self._bad.total} of {self._seen} samples are bad, allowed: {allowed:g}: "
                f"{self._bad}; fix: {self._remedy()}; the shards written so far stay"
            )
        if final:
            not_empty(self._config.data, self._seen)
        if final and self._bad.total == self._seen:
            raise DataError(
                f"data.source: got {self._config.data.source!r}, none of whose {self._seen} samples is usable: {self._bad}; "
                f"fix: {self._remedy()}"
            )

    def _remedy(self) -> str:
        return ", ".join(
            [*self._config.data.cures(self._bad.counts), "other samples or data.max_bad_fraction"]
        )

    def _path(self, number: int) -> Path:
        return self._folder / "shards" / f"{number:05d}.safetensors"


def _remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def check_borrowed(config: RunConfig) -> None:
    """ConfigError if data.source is another run's cache that this run cannot use, such as that of another teacher. A teacher
    that `prepare` has yet to make is not compared."""
    if not is_cache(config.data.source) or not (is_ready_made(config) or made_folder(config)):
        return
    base = teacher_folder(config)
    source = {"teacher": fingerprint(base), "encoders": encoder_fingerprint(base)}
    borrowed_manifest(settled(config), Path(config.data.source).expanduser(), source)


def check_captions(config: RunConfig) -> None:
    """ConfigError if a caption of the data is of none of several teachers. Captions that cannot be read are left to
    `prepare`, and those in another run's cache to the ladder."""
    if not config.teachers or is_cache(config.data.source):
        return
    for record in training_records(settled(config).data, seed=data_seed(config)):
        with contextlib.suppress(BadSample):
            check_prompts(config.teachers, [read_caption(record.read_caption())])


def borrowed_manifest(config: RunConfig, lender: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The manifest of another run's cache.

    ConfigError if it is damaged, if its latents are another model's, or if it was made with another data.held_out.
    """
    manifest = read_sealed(lender / "manifest.json") or {}
    if manifest.get("format") != FORMAT or not is_whole(manifest):
        raise ConfigError(
            f"data.source: {lender / 'manifest.json'} is damaged or of another version: {manifest.get('format')!r}; "
            f"fix: `stepdistill prepare` in its run"
        )
    for part in ("teacher", "encoders"):
        if manifest.get(part) != source[part]:
            raise ConfigError(
                f"data.source: {lender} holds latents of another model ({part} {manifest.get(part)}, this run's is "
                f"{source[part]}); allowed: a cache of the same teacher, or the images themselves"
            )
    held_out = (manifest.get("data") or {}).get("held_out")
    if held_out != config.data.held_out:
        raise ConfigError(
            f"data.held_out: got {config.data.held_out}; allowed: {held_out}, the share that {lender} was made with"
        )
    return manifest


def _digest(records: Sequence[Record]) -> str:
    """sha256 over the names, captions and versions of a shard's records."""
    digest = hashlib.sha256()
    for record in records:
        try:
            caption = read_caption(record.read_caption())
        except BadSample as error:
            caption = f"\0{error.kind}"
        digest.update(json.dumps([record.name, caption, record.version()], allow_nan=False).encode() + b"\n")
    return digest.hexdigest()
