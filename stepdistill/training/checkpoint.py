"""Checkpoints of a rung that is being trained: the whole state between two updates, from which training continues exactly.

rungs/.<student_steps>.partial/checkpoints/phase1-step000120/
  state.safetensors   every tensor of PhaseState, and of a discriminator that a later phase starts from
  manifest.json       where it was taken and of what, the numbers of the state, the sha256 of state.safetensors; written last

A checkpoint is written beside its place, synced to the disk and renamed, so it is complete or absent. Tensors are in
safetensors and all else is in JSON: no file is unpickled.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from stepdistill.disk.durable import read_sealed, sha256_bytes, warn_of_damage, write_synced_folder
from stepdistill.errors import CheckpointError
from stepdistill.run.checkpoint_files import MANIFEST, STATE, checkpoint_name, folders_of, place_of
from stepdistill.run.settings import differences, differences_text

logger = logging.getLogger(__name__)
_TENSOR = "tensor"
"""Key of an object that stands for a tensor in the JSON of a state; its value is the tensor's name in state.safetensors."""
_FORMAT = 2


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. A run continues from it only if all of it is equal, except versions, which warn.

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

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk, or has failed, which is warned of: training itself can go on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, folder: Path, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        infinite = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
        if infinite is not None:
            logger.warning(
                "distill: no checkpoint at phase %d, step %d: %s is not finite",
                about["phase"],
                about["step"],
                infinite,
            )
            return
        try:
            content = save(tensors)
            about["sha256"] = sha256_bytes(content)
            write_synced_folder(folder, {STATE: content}, {MANIFEST: about})
            self._remove_old()
        except (OSError, ValueError) as error:
            logger.warning(
                "distill: no checkpoint at phase %d, step %d: %s", about["phase"], about["step"], error
            )

    def _remove_old(self) -> None:
        """Removes all but the newest ones, and the one at the start of the newest one's phase: a phase whose settings are
        changed after it diverged is then trained again by itself."""
        folders = list(folders_of(self.folder))
        phase_start = self.folder / checkpoint_name(place_of(folders[0])[0], 0)
        for old in folders[self._keep :]:
            if old != phase_start:
                shutil.rmtree(old, ignore_errors=True)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def newest(folder: Path, identity: Callable[[int, int], Identity]) -> Checkpoint | None:
    """The newest intact checkpoint of a rung, or None if it has none. Damaged ones are passed over with a warning.

    identity: what the state must belong to, by (phase, step). CheckpointError if it belongs to something else.
    """
    for path in folders_of(folder):
        try:
            checkpoint, taken_of = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            warn_of_damage(path, "training continues from the checkpoint before it, or starts the rung again")
            continue
        _check_identity(path, taken_of, identity(checkpoint.phase, checkpoint.step))
        return checkpoint
    return None


def _read(path: Path) -> tuple[Checkpoint, Identity]:
    """A checkpoint, and what it belongs to. OSError, ValueError, KeyError, TypeError or SafetensorError if it is damaged."""
    about = read_sealed(path / MANIFEST)
    content = (path / STATE).read_bytes()
    if about is None or sha256_bytes(content) != about["sha256"] or about["format"] != _FORMAT:
        raise ValueError(f"{path} was changed")
    if not _is_sound(about):
        raise ValueError(f"{path} has values that no checkpoint has")
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
    other = [
        meaning
        for name, meaning in _meanings(taken_of, now).items()
        if getattr(taken_of, name) != getattr(now, name)
    ]
    if other:
        raise CheckpointError(
            f"{path} belongs to {' and '.join(other)}; allowed: what the run was started with; mend: put that back, or "
            f"remove {path.parent}, and the rung is trained again"
        )
    changed = differences(taken_of.versions, now.versions)
    if changed:
        logger.warning(
            "distill: %s was written with other versions (%s); weights may differ in their last bits",
            path,
            differences_text(changed),
        )


def _meanings(taken_of: Identity, now: Identity) -> dict[str, str]:
    """What it means, by the field's name, that two identities differ in it."""
    return {
        "settings": f"other settings ({differences_text(differences(taken_of.settings, now.settings))})",
        "rungs": "another LoRA of an earlier rung",
        "base": "another base model",
        "cache": "other latents",
        "samples": f"updates of {taken_of.samples} samples (now {now.samples})",
    }


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
