"""Checkpoints of a rung that is being trained: the whole state between two updates, from which training continues exactly.

rungs/.<student_steps>.partial/checkpoints/phase1-step000120/
  state.safetensors   every tensor of PhaseState, and of a discriminator that a later phase starts from
  manifest.json       where it was taken and of what, the numbers of the state, the sha256 of state.safetensors; written last

A checkpoint is written beside its place, synced to the disk and renamed, so it is complete or absent. Tensors are in
safetensors and all else is in JSON: no file is unpickled.
"""

import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed, sha256_bytes, warn_of_damage, write_synced_folder

logger = logging.getLogger(__name__)
STATE, MANIFEST = "state.safetensors", "manifest.json"
_NAME = re.compile(r"phase(\d+)-step(\d+)")
_TENSOR = "tensor"
"""Key of an object that stands for a tensor in the JSON of a state; its value is the tensor's name in state.safetensors."""
_FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. A run continues from it only if all of it is equal, except versions, which warn.

    config    hash of all settings that the weights depend on
    base      fingerprint of the base model
    cache     hash of the latents' and text embeddings' shards
    samples   number of samples of an update, over all processes
    versions  of torch, diffusers and the like, by name
    """

    config: str
    base: str
    cache: str
    samples: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: `state` of phase number `phase`, after `step` of its updates.

    carried  the state of an earlier phase's discriminator that this phase or a later one starts from, or None
    seconds  training time of the rung so far
    """

    folder: Path
    phase: int
    step: int
    state: dict[str, Any]
    carried: dict[str, Any] | None
    seconds: float


class Checkpoints:
    """Writes the checkpoints of one rung, in a thread, and keeps the newest ones.

    Args:
        folder: checkpoints/ of the rung.
        identity: what they belong to.
        every_minutes: time between two of them; None: only between phases.
        keep: how many stay.
        seconds: training time of the rung before this process.
    """

    def __init__(
        self, folder: Path, identity: Identity, *, every_minutes: float | None, keep: int, seconds: float
    ) -> None:
        self._folder, self._identity, self._keep = folder, identity, keep
        self._every = None if every_minutes is None else 60 * every_minutes
        self._started = time.monotonic() - seconds
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    @property
    def seconds(self) -> float:
        """Training time of the rung so far."""
        return time.monotonic() - self._started

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for a new one."""
        return self._every is not None and time.monotonic() - self._last >= self._every

    def save(
        self, phase: int, step: int, state: Mapping[str, Any], carried: Mapping[str, Any] | None
    ) -> None:
        """Writes a checkpoint in a thread. `state` and `carried` must be copies that nobody changes."""
        self.wait()
        self._last = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        about = {
            "format": _FORMAT,
            "phase": phase,
            "step": step,
            "seconds": self.seconds,
            "identity": vars(self._identity) | {"versions": dict(self._identity.versions)},
            "state": _flattened(state, "state", tensors),
            "carried": _flattened(carried, "carried", tensors),
        }
        folder = self._folder / f"phase{phase}-step{step:06d}"
        self._thread = threading.Thread(
            target=self._write, args=(folder, about, tensors), name="checkpoint writer"
        )
        self._thread.start()

    def remove(self) -> None:
        """Removes all of them, once the rung is finished."""
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk, or has failed, which is warned of: training itself can go on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, folder: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        try:
            content = save(tensors)
            about["sha256"] = sha256_bytes(content)
            write_synced_folder(folder, {STATE: content}, {MANIFEST: about})
            for old in list(folders_of(self._folder))[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, ValueError) as error:
            logger.warning(
                "distill: no checkpoint at phase %d, step %d: %s", about["phase"], about["step"], error
            )


def folders_of(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder, damaged ones too, the latest phase and step first."""
    named = [(match, path) for path in folder.glob("phase*-step*") if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(named, key=lambda item: (int(item[0][1]), int(item[0][2])), reverse=True):
        yield path


def newest(folder: Path, identity: Identity) -> Checkpoint | None:
    """The newest intact checkpoint of a rung, or None if it has none. Damaged ones are passed over with a warning.

    ConfigError if the checkpoint belongs to another config or base model, or to other latents.
    """
    for path in folders_of(folder):
        try:
            checkpoint, taken_of = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            warn_of_damage(path, "training continues from the checkpoint before it, or starts the rung again")
            continue
        _check_identity(path, taken_of, identity)
        return checkpoint
    return None


def _read(path: Path) -> tuple[Checkpoint, Identity]:
    """A checkpoint, and what it belongs to. OSError, ValueError, KeyError, TypeError or SafetensorError if it is damaged."""
    about = read_sealed(path / MANIFEST)
    content = (path / STATE).read_bytes()
    if about is None or sha256_bytes(content) != about["sha256"] or about["format"] != _FORMAT:
        raise ValueError(f"{path} was changed")
    tensors = load(content)
    state, carried = (_restored(about[name], tensors) for name in ("state", "carried"))
    checkpoint = Checkpoint(path, about["phase"], about["step"], state, carried, about["seconds"])
    return checkpoint, Identity(**about["identity"])


def _check_identity(path: Path, taken_of: Identity, now: Identity) -> None:
    """ConfigError if a checkpoint belongs to something else than this run; a warning if the versions differ."""
    meanings = {"config": "another config", "base": "another base model", "cache": "other latents"}
    meanings["samples"] = f"updates of {taken_of.samples} samples (now {now.samples})"
    other = [meaning for name, meaning in meanings.items() if getattr(taken_of, name) != getattr(now, name)]
    if other:
        raise ConfigError(
            f"{path} belongs to {' and '.join(other)}; allowed: what the run was started with; mend: put that back, or "
            f"remove {path.parent}, and the rung is trained again"
        )
    changed = {k: v for k, v in taken_of.versions.items() if now.versions.get(k) != v}
    if changed:
        listed = ", ".join(
            f"{name} {before} (now {now.versions.get(name)})" for name, before in changed.items()
        )
        logger.warning("distill: %s was written with %s; weights may differ in their last bits", path, listed)


def _flattened(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain data for JSON, with each tensor put into `tensors` under its place in the state and named in the data."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _flattened(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_flattened(part, f"{name}/{index}", tensors) for index, part in enumerate(value)]
    return value


def _restored(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that `_flattened` was given, with tuples as lists."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _restored(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_restored(part, tensors) for part in value]
    return value
