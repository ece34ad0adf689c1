"""Starting a run from a finished rung of another run (`start_from`): which rungs it takes over, whether they fit, and how
they are copied into its folder. After that the other run is no longer needed. No torch.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.saved import saved_config
from stepdistill.disk.durable import read_sealed, sha256_file, warn_of_damage, whole_folder, write_sealed
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, read_rung, rung_folder

logger = logging.getLogger(__name__)
TAKEN = "taken_rungs.json"
"""File at the top of a run's folder: the origin of every rung that was taken over, and the config it was trained with."""


@dataclass(frozen=True)
class TakenRung:
    """A finished rung of another run, which this run takes over."""

    folder: Path
    record: RungRecord


def taken_steps(config: RunConfig) -> list[int]:
    """student_steps of the rungs that come from another run: the `start_from` rung and those before it in the ladder."""
    if config.start_from is None:
        return []
    record = RungRecord.read(_start(config))
    name = _start(config).name  # used if the other run was deleted after its rungs were copied
    first = record.student_steps if record is not None else int(name) if name.isdecimal() else None
    students = [rung.student_steps for rung in config.ladder]
    return students[: students.index(first) + 1] if first in students else []


def check_start(config: RunConfig, *, base_prediction_type: str | None) -> None:
    """ConfigError if a rung that is still to be copied into the run's folder cannot be taken over.

    base_prediction_type: what the teacher predicts; None if that is not known yet: it is then checked before training.
    """
    if config.start_from is None:
        return
    steps = taken_steps(config)
    if not steps or any(RungRecord.read(rung_folder(config.run_dir, n)) is None for n in steps):
        rungs_to_take(config, base_prediction_type=base_prediction_type)


def missing_rungs(config: RunConfig, *, base_prediction_type: str) -> list[TakenRung]:
    """The rungs to take over that are missing or damaged in the run's folder; ConfigError if one does not fit."""
    if config.start_from is None:
        return []
    steps = taken_steps(config)
    if steps and all(read_rung(config.run_dir, n) is not None for n in steps):
        return []
    rungs = rungs_to_take(config, base_prediction_type=base_prediction_type)
    return [rung for rung in rungs if read_rung(config.run_dir, rung.record.student_steps) is None]


def rungs_to_take(config: RunConfig, *, base_prediction_type: str | None) -> list[TakenRung]:
    """The `start_from` rung and those before it, in the ladder's order; ConfigError if one is missing or does not fit."""
    folder = _start(config)
    record = RungRecord.read(folder)
    if record is None:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, which is not a finished rung; allowed: a rung's folder of another run, "
            f"such as runs/NAME/rungs/32"
        )
    students = [rung.student_steps for rung in config.ladder]
    if record.student_steps not in students:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, a rung of {record.student_steps} steps; allowed: one of this ladder's: "
            f"{', '.join(map(str, students))}"
        )
    rungs = [
        _rung(config, index, folder, record) for index in range(students.index(record.student_steps) + 1)
    ]
    for index, rung in enumerate(rungs):
        _check_settings(config, index, rung, base_prediction_type)
    return rungs


def _rung(config: RunConfig, index: int, start: Path, start_record: RungRecord) -> TakenRung:
    """Rung number `index` of this run's ladder: the rung in the folder `start`, or one in a folder beside it."""
    steps = config.ladder[index].student_steps
    is_start = steps == start_record.student_steps
    folder = start if is_start else start.with_name(str(steps))
    record = start_record if is_start else RungRecord.read(folder)
    if record is None:
        raise ConfigError(
            f"start_from: got {config.start_from!r}, but {folder}, which this ladder has before it, is not a finished rung; "
            f"allowed: a ladder that begins with {start_record.teacher_steps} -> {start_record.student_steps}"
        )
    return TakenRung(folder, record)


def _check_settings(
    config: RunConfig, index: int, taken: TakenRung, base_prediction_type: str | None
) -> None:
    """ConfigError if a rung was trained with other settings than this run has."""
    key, rung, record = f"ladder.{index}", config.ladder[index], taken.record
    settings: list[tuple[str, object, object]] = [
        ("lora.rank", config.lora.rank, record.lora_rank),
        (f"{key}.teacher_steps", rung.teacher_steps, record.teacher_steps),
        (f"{key}.start_timestep", rung.start_timestep, record.start_timestep),
    ]
    if base_prediction_type is not None:
        predicted = config.prediction_types(base_prediction_type)[index]
        settings.append((f"{key}.prediction_type", predicted, record.prediction_type))
    for name, asked, made_with in settings:
        if asked != made_with:
            raise ConfigError(
                f"{name}: got {asked}, but the rung in {taken.folder} has {made_with}; allowed: the same value, or another "
                f"start_from"
            )


def check_rungs_base(config: RunConfig, rungs: list[TakenRung], *, base_fingerprint: str) -> None:
    """ConfigError if one of the rungs was trained on another base model than this run's teacher."""
    for rung in rungs:
        if rung.record.base_fingerprint != base_fingerprint:
            raise ConfigError(
                f"start_from: the rung in {rung.folder} belongs to the base model {rung.record.base_fingerprint}, but the "
                f"teacher {config.teacher.path!r} is {base_fingerprint}; allowed: a rung of a run with the same teacher"
            )


def take_rungs(config: RunConfig, rungs: list[TakenRung]) -> None:
    """Copies LoRA, record and previews of these rungs into the run's folder; ConfigError if one is damaged."""
    for rung in rungs:
        _take(config, rung)


def _take(config: RunConfig, rung: TakenRung) -> None:
    weights, steps = rung.folder / WEIGHT_NAME, rung.record.student_steps
    if not weights.is_file() or sha256_file(weights) != rung.record.sha256:
        raise ConfigError(
            f"start_from: {weights} is missing or not as it was written; allowed: an intact rung"
        )
    with whole_folder(rung_folder(config.run_dir, steps)) as folder:
        shutil.copyfile(weights, folder / WEIGHT_NAME)
        if (rung.folder / "previews").is_dir():
            shutil.copytree(rung.folder / "previews", folder / "previews")
        rung.record.write(folder)
    about = {"from": str(rung.folder), "sha256": rung.record.sha256, "config": _config_behind(rung)}
    write_sealed(config.run_dir / TAKEN, {**read_taken(config.run_dir), str(steps): about})
    logger.info("distill: the %d-step rung is taken over from %s", steps, rung.folder)


def _config_behind(rung: TakenRung) -> dict[str, Any] | None:
    """The config of the run that a rung belongs to; None if its folder is not inside a run's folder."""
    try:
        return saved_config(rung.folder.parent.parent)
    except ConfigError:
        return None


def _start(config: RunConfig) -> Path:
    return Path(config.start_from or "").expanduser()


def read_taken(run_dir: Path) -> dict[str, Any]:
    """taken_rungs.json by student_steps; empty if no rung was taken over, and, with a warning, if the file is damaged."""
    taken = read_sealed(run_dir / TAKEN)
    if taken is None and (run_dir / TAKEN).exists():
        warn_of_damage(run_dir / TAKEN, "it is no longer known from which run rungs were taken over")
    return taken or {}


def taken_from(run_dir: Path, student_steps: int, sha256: str | None) -> str | None:
    """The folder that a rung was taken over from; None if the rung was trained in this run."""
    about = read_taken(run_dir).get(str(student_steps))
    if not isinstance(about, dict) or sha256 is None or about.get("sha256") != sha256:
        return None
    return str(about.get("from"))
