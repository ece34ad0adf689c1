"""A run that begins at a finished rung of another: which rungs it takes over, and whether they fit. Files only, no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig, Rung
from stepdistill.config.ladder_checks import prediction_types
from stepdistill.models.folder import prediction_type
from stepdistill.models.teacher_source import teacher_folder
from stepdistill.run.durable import read_sealed, warn_of_damage
from stepdistill.run.rungs import RungRecord, rung_folder

TAKEN = "taken_rungs.json"
"""At the top of a run's folder: of every rung that was taken over, from where and how it was made there."""


@dataclass(frozen=True)
class TakenRung:
    """A finished rung of another run."""

    folder: Path
    record: RungRecord


def taken_steps(config: RunConfig) -> list[int]:
    """student_steps of the ladder's rungs that come from another run: the one that it starts from and those before it."""
    if config.start_from is None:
        return []
    record = RungRecord.read(_start(config))
    name = _start(config).name  # where the other run is gone and its rungs were copied long ago
    first = record.student_steps if record is not None else int(name) if name.isdecimal() else None
    students = [rung.student_steps for rung in config.ladder]
    return students[: students.index(first) + 1] if first in students else []


def check_start(config: RunConfig) -> None:
    """ConfigError where rungs that are not in the run's folder yet cannot be taken over."""
    if config.start_from is None:
        return
    steps = taken_steps(config)
    if not steps or any(RungRecord.read(rung_folder(config.run_dir, n)) is None for n in steps):
        rungs_to_take(config)


def rungs_to_take(config: RunConfig) -> list[TakenRung]:
    """The rungs that `start_from` leads to, in the ladder's order; ConfigError where one is missing or does not fit."""
    folder = _start(config)
    record = RungRecord.read(folder)
    if record is None:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, which is no finished rung; allowed: a rung's folder of another run, "
            f"such as runs/NAME/rungs/32"
        )
    students = [rung.student_steps for rung in config.ladder]
    if record.student_steps not in students:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, a rung of {record.student_steps} steps; allowed: one of this ladder's: "
            f"{', '.join(map(str, students))}"
        )
    return [
        _fitting(config, index, folder, record) for index in range(students.index(record.student_steps) + 1)
    ]


def _fitting(config: RunConfig, index: int, start: Path, started: RungRecord) -> TakenRung:
    rung = config.ladder[index]
    is_start = rung.student_steps == started.student_steps
    folder = start if is_start else start.with_name(str(rung.student_steps))
    record = started if is_start else RungRecord.read(folder)
    if record is None:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, but {folder}, which this ladder has before it, is no finished rung; "
            f"allowed: a ladder that begins with {started.teacher_steps} -> {started.student_steps}"
        )
    for key, value, there in _settings(config, index, rung, record):
        if value != there:
            raise ConfigError(
                f"{key}: got {value}, but the rung in {folder} has {there}; allowed: the same value, or another start_from"
            )
    return TakenRung(folder, record)


def _settings(
    config: RunConfig, index: int, rung: Rung, record: RungRecord
) -> list[tuple[str, object, object]]:
    """(key, its value in this run, the rung's own) of all that must be equal."""
    key = f"ladder.{index}"
    settings: list[tuple[str, object, object]] = [
        ("lora.rank", config.lora.rank, record.lora_rank),
        (f"{key}.teacher_steps", rung.teacher_steps, record.teacher_steps),
        (f"{key}.start_timestep", rung.start_timestep, record.start_timestep),
    ]
    try:
        base = prediction_type(teacher_folder(config))
    except ConfigError:  # not made yet; it is looked at again before anything is trained
        return settings
    kind = prediction_types(config, base)[index]
    return [*settings, (f"{key}.prediction_type", kind, record.prediction_type)]


def _start(config: RunConfig) -> Path:
    return Path(config.start_from or "").expanduser()


def read_taken(run_dir: Path) -> dict[str, Any]:
    """What taken_rungs.json says, by steps; empty where no rung was taken over, or with a warning where it is damaged."""
    taken = read_sealed(run_dir / TAKEN)
    if taken is None and (run_dir / TAKEN).exists():
        warn_of_damage(run_dir / TAKEN, "where rungs were taken over from is not known any more")
    return taken or {}


def taken_from(run_dir: Path, student_steps: int, sha256: str | None) -> str | None:
    """Where a rung of a run's folder was taken over from; None where it was trained there."""
    about = read_taken(run_dir).get(str(student_steps))
    if not isinstance(about, dict) or sha256 is None or about.get("sha256") != sha256:
        return None
    return str(about.get("from"))
