"""Checkpoints of a rung that is being trained: the whole state between two updates, from which training continues exactly.

rungs/.<student_steps>.partial/checkpoints/phase1-step000120/
  state.safetensors   every tensor of PhaseState, and of a discriminator that a later phase starts from
  manifest.json       where it was taken and of what, the numbers of the state, the sha256 of state.safetensors; written last

A checkpoint is written beside its place, synced to the disk and renamed, so it is complete or absent. Tensors are in
safetensors and all else is in JSON: no file is unpickled.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from stepdistill.disk.durable import (
    sha256_bytes,
    sha256_file,
    unsealed,
    warn_of_damage,
    whole_folder,
    write_sealed,
)
from stepdistill.errors import CheckpointError
from stepdistill.run.checkpoint_files import MANIFEST, STATE, checkpoint_name, folders_of, place_of
from stepdistill.run.settings import differences, differences_text

logger = logging.getLogger(__name__)
_TENSOR = "tensor"
"""Key of an object that stands for a tensor in the JSON of a state; its value is the tensor's name in state.safetensors."""
_FORMAT = 3


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. A run continues from it only if all of it is equal; other versions only warn.

    settings  by dotted key, those that the state depends on (run/settings.py)
    rungs     sha256 of the LoRAs of the earlier rungs, by student_steps
    base      fingerprint of the base model
    cache     hash of the latents' and text embeddings' shards
    samples   number of samples of an update, over all processes
    versions  of torch, diffusers and the like, by name
    """

    settings: Mapping[str, Any]
    rungs: Mapping[str, str]
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
        identity: what the state after `step` updates of phase number `phase` belongs to, by (phase, step).
        every_minutes: time between two of them; None: only between phases.
        keep: how many stay.
        seconds: training time of the rung before this process.
    """

    def __init__(
        self,
        folder: Path,
        identity: Callable[[int, int], Identity],
        *,
        every_minutes: float | None,
        keep: int,
        seconds: float,
    ) -> None:
        self.folder, self._identity, self._keep = folder, identity, keep
        self._every = None if every_minutes is None else 60 * every_minutes
        self._started = time.monotonic() - seconds
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

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
            "identity": {name: _plain(part) for name, part in vars(self._identity(phase, step)).items()},
            "state": _flattened(state, "state", tensors),
            "carried": _flattened(carried, "carried", tensors),
        }
        folder = self.folder / checkpoint_name(phase, step)
        self._thread = threading.Thread(
            target=self._write, args=(folder, about, tensors), name="checkpoint writer"
        )
        self._thread.start()

    def remove(self) -> None:
        """Removes all of them, once the rung is finished."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self) -> str | None:
        """Waits until the last checkpoint is on disk: None, or why it could not be written. That was warned of: training
        itself can go on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._failure

    def _write(self, folder: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Writes a checkpoint and removes old ones. No error leaves this thread: `wait` tells of it."""
        try:
            _check_finite(tensors)
            with whole_folder(folder) as partial:
                save_file(tensors, partial / STATE)
                write_sealed(partial / MANIFEST, about | {"sha256": sha256_file(partial / STATE)})
            self._remove_old()
            self._failure = None
        except Exception as error:  # memory and libraries fail in ways of their own
            self._failure = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "distill: no checkpoint at phase %d, step %d: %s",
                about["phase"],
                about["step"],
                self._failure,
            )

    def _remove_old(self) -> None:
        """Keeps the newest checkpoints, and the one at the start of the newest one's phase, with which a phase that diverged
        can be trained again with other settings; removes the others."""
        folders = list(folders_of(self.folder))
        phase_start = self.folder / checkpoint_name(place_of(folders[0])[0], 0)
        for old in folders[self._keep :]:
            if old != phase_start:
                shutil.rmtree(old, ignore_errors=True)


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """ValueError if a tensor has a value that is not finite: training could not continue from it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")


def remove_after(folder: Path, phase: int, step: int) -> None:
    """Removes the checkpoints of later updates: damaged ones that were passed over, or those of a phase that goes back. They
    would count as the newest ones, and new checkpoints would be removed in their place."""
    for path in folders_of(folder):
        if place_of(path) > (phase, step):
            shutil.rmtree(path, ignore_errors=True)


def newest(
    folder: Path, identity: Callable[[int, int], Identity], *, until: tuple[int, int] | None = None
) -> Checkpoint | None:
    """The newest intact checkpoint of a rung, or None if it has none. Passed over with a warning are damaged ones, and those
    that began with another LoRA of an earlier rung than that has now.

    Args:
        folder: checkpoints/ of the rung.
        identity: what the state must belong to, by (phase, step).
        until: the (phase, step) of the last checkpoint that may be taken.

    CheckpointError if the checkpoint belongs to something else, was written in another format, or cannot be read.
    """
    for path in folders_of(folder):
        if until is not None and place_of(path) > until:
            continue
        try:
            checkpoint, taken_of = _read(path)
        except CheckpointError:
            raise
        except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError, SafetensorError):
            warn_of_damage(path, "training continues from the checkpoint before it, or starts the rung again")
            continue
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {os.strerror(error.errno or 0)}; nothing was removed; fix: make it readable, then "
                f"the same command; or remove it, and training continues from the checkpoint before it"
            ) from None
        now = identity(checkpoint.phase, checkpoint.step)
        if taken_of.rungs != now.rungs:
            logger.warning(
                "distill: %s began with another LoRA of an earlier rung than that has now: it is not used",
                path,
            )
            continue
        _check_identity(path, taken_of, now)
        return checkpoint
    return None


def _read(path: Path) -> tuple[Checkpoint, Identity]:
    """A checkpoint, and what it belongs to. FileNotFoundError, ValueError, RecursionError, KeyError, TypeError or
    SafetensorError if it is damaged; another OSError if it cannot be read; CheckpointError if its format is another."""
    about = unsealed(json.loads((path / MANIFEST).read_bytes()))
    if about is None or not _is_sound(about):
        raise ValueError(f"{path / MANIFEST} was changed")
    if about["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} was written by another version of stepdistill (format {about['format']}; allowed: {_FORMAT}); fix: "
            f"continue with that version, or remove {path.parent}, and the rung is trained again"
        )
    content = (path / STATE).read_bytes()
    if sha256_bytes(content) != about["sha256"]:
        raise ValueError(f"{path / STATE} was changed")
    tensors = load(content)
    state, carried = (_restored(about[name], tensors) for name in ("state", "carried"))
    checkpoint = Checkpoint(path, about["phase"], about["step"], state, carried, about["seconds"])
    return checkpoint, Identity(**about["identity"])


def _is_sound(about: Mapping[str, Any]) -> bool:
    """Whether the values of a manifest have the right types. KeyError if one is missing."""
    identity = about["identity"]
    return (
        all(type(about[name]) is int and about[name] >= 0 for name in ("phase", "step"))
        and isinstance(about["seconds"], int | float)
        and isinstance(about["state"], dict)
        and isinstance(about["carried"], dict | None)
        and isinstance(identity, dict)
        and all(isinstance(identity.get(name), dict) for name in ("settings", "rungs", "versions"))
    )


def _check_identity(path: Path, taken_of: Identity, now: Identity) -> None:
    """CheckpointError if a checkpoint belongs to something else than this run; a warning if the versions differ."""
    other = list(_other(taken_of, now))
    if other:
        raise CheckpointError(
            f"{path} belongs to {' and '.join(other)}; allowed: what the run was started with; fix: put that back, or "
            f"remove {path.parent}, and the rung is trained again"
        )
    changed = differences(taken_of.versions, now.versions)
    if changed:
        logger.warning(
            "distill: %s was written with other versions (%s); weights may differ in their last bits",
            path,
            differences_text(changed),
        )


def _other(taken_of: Identity, now: Identity) -> Iterator[str]:
    """What a checkpoint belongs to and this run does not have."""
    changed = differences(taken_of.settings, now.settings)
    if changed:
        yield f"other settings ({differences_text(changed)})"
    if taken_of.base != now.base:
        yield "another base model"
    if taken_of.cache != now.cache:
        yield "other latents"
    if taken_of.samples != now.samples:
        yield f"updates of {taken_of.samples} samples (now {now.samples})"


def _plain(part: Any) -> Any:
    return dict(part) if isinstance(part, Mapping) else part


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
