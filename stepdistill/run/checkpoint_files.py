"""Where the checkpoints of a rung lie, and whether this config may continue from them. No torch: no tensor is read.

rungs/.<student_steps>.partial/checkpoints/phase1-step000120/
  state.safetensors   every tensor of the state
  manifest.json       what the state belongs to, the numbers of the state, the sha256 of state.safetensors; written last
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.config import RunConfig
from stepdistill.disk.durable import read_sealed
from stepdistill.errors import CheckpointError
from stepdistill.run.settings import Difference, differences, differences_text, settings_behind

CHECKPOINTS, STATE, MANIFEST = "checkpoints", "state.safetensors", "manifest.json"
_NAME = re.compile(r"phase(\d+)-step(\d+)")
_PARTIAL = re.compile(r"\.(\d+)\.partial")


def partial_rung(run_dir: Path, student_steps: int) -> Path:
    """The folder of a rung that is being trained."""
    return run_dir / "rungs" / f".{student_steps}.partial"


def unfinished_rungs(run_dir: Path) -> dict[int, Path]:
    """student_steps -> folder of the rungs whose training stopped and left a checkpoint."""
    folders = {}
    for partial in (run_dir / "rungs").glob(".*.partial"):
        match = _PARTIAL.fullmatch(partial.name)
        if match is not None and any(folders_of(partial / CHECKPOINTS)):
            folders[int(match[1])] = partial
    return folders


def checkpoint_name(phase: int, step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"phase{phase}-step{step:06d}"


def place_of(folder: Path) -> tuple[int, int]:
    """(phase, step) of a checkpoint by the name of its folder, which must be one of `folders_of`."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2])


def folders_of(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder, damaged ones too, the latest phase and step first."""
    named = [path for path in folder.glob("phase*-step*") if _NAME.fullmatch(path.name)]
    yield from sorted(named, key=place_of, reverse=True)


def check_checkpoints(config: RunConfig) -> None:
    """CheckpointError if the newest checkpoint of a rung depends on settings that this config has changed.

    The message names each setting and the folders to remove, so that training continues from an earlier checkpoint.
    """
    for student_steps, partial in unfinished_rungs(config.run_dir).items():
        _check_rung(config, student_steps, partial / CHECKPOINTS)


def _check_rung(config: RunConfig, student_steps: int, folder: Path) -> None:
    unusable: list[Path] = []
    shown = ""
    for path in folders_of(folder):
        manifest = read_sealed(path / MANIFEST)
        changes = None if manifest is None else _changes(config, student_steps, path, manifest)
        if changes is None:
            continue
        if not changes:
            break
        unusable.append(path)
        shown = shown or differences_text(changes)
    if not unusable:
        return
    left = next((p for p in folders_of(folder) if p not in unusable), None)
    then = (
        f"training continues from {left.name}" if left is not None else "the rung is trained from its start"
    )
    names = " and ".join(str(path) for path in unusable)
    raise CheckpointError(
        f"{unusable[0]} was made with other settings: {shown}; allowed: the same values; fix: put them back, or remove "
        f"{names}, and {then}"
    )


def _changes(
    config: RunConfig, student_steps: int, path: Path, manifest: dict[str, Any]
) -> list[Difference] | None:
    """The settings that the checkpoint depends on and that have changed; None if its manifest does not say them."""
    identity = manifest.get("identity")
    before = identity.get("settings") if isinstance(identity, dict) else None
    if not isinstance(before, dict):
        return None
    position = next((i for i, r in enumerate(config.ladder) if r.student_steps == student_steps), None)
    if position is None:
        return [(f"the rung of {student_steps} steps", "in the ladder", "not in the ladder")]
    phase, step = place_of(path)
    return differences(before, settings_behind(config, position=position, phase=phase, step=step))
