"""Rungs of another run copied into this one's folder, which then needs the other no more."""

import logging
import shutil

from stepdistill.config import ConfigError, RunConfig
from stepdistill.models.loading import fingerprint
from stepdistill.models.teacher_source import teacher_folder
from stepdistill.run.durable import sha256_file, whole_folder, write_sealed
from stepdistill.run.folder import saved_config
from stepdistill.run.rungs import WEIGHT_NAME, read_rung, rung_folder
from stepdistill.run.start_from import TAKEN, TakenRung, read_taken, rungs_to_take, taken_steps
from stepdistill.runtime import Processes

logger = logging.getLogger(__name__)


def check_base(config: RunConfig) -> None:
    """ConfigError where rungs that are yet to be taken over belong to another base than this run's teacher."""
    for taken in _missing(config):
        _check_base(config, taken)


def take_rungs(config: RunConfig) -> None:
    """Copies LoRA, record and previews of every rung that `start_from` leads to and that is not in the run's folder yet, by
    one process; ConfigError where one does not fit or is damaged."""
    processes = Processes()
    if config.start_from is not None and processes.is_main:
        for taken in _missing(config):
            _take(config, taken)
    processes.wait()


def _missing(config: RunConfig) -> list[TakenRung]:
    steps = taken_steps(config)
    if steps and all(read_rung(config.run_dir, n) is not None for n in steps):
        return []
    if config.start_from is None:
        return []
    taken = rungs_to_take(config)
    return [one for one in taken if read_rung(config.run_dir, one.record.student_steps) is None]


def _check_base(config: RunConfig, taken: TakenRung) -> None:
    base = fingerprint(teacher_folder(config))
    if taken.record.base_fingerprint != base:
        raise ConfigError(
            f"start_from: the rung in {taken.folder} belongs to the base {taken.record.base_fingerprint}, and the teacher "
            f"{config.teacher.path!r} is {base}; allowed: a rung of a run of the same teacher"
        )


def _take(config: RunConfig, taken: TakenRung) -> None:
    _check_base(config, taken)
    weights = taken.folder / WEIGHT_NAME
    if not weights.is_file() or sha256_file(weights) != taken.record.sha256:
        raise ConfigError(
            f"start_from: {weights} is missing or not as it was written; allowed: an intact rung"
        )
    steps = taken.record.student_steps
    with whole_folder(rung_folder(config.run_dir, steps)) as folder:
        shutil.copyfile(weights, folder / WEIGHT_NAME)
        if (taken.folder / "previews").is_dir():
            shutil.copytree(taken.folder / "previews", folder / "previews")
        taken.record.write(folder)
    about = {"from": str(taken.folder), "sha256": taken.record.sha256, "config": _made_by(taken)}
    write_sealed(config.run_dir / TAKEN, {**read_taken(config.run_dir), str(steps): about})
    logger.info("distill: the %d-step rung is taken over from %s", steps, taken.folder)


def _made_by(taken: TakenRung) -> dict | None:
    """The config of the run that a rung is from, where it lies in one."""
    try:
        return saved_config(taken.folder.parent.parent)
    except ConfigError:
        return None
