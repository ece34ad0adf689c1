"""The files of an exported folder that describe its LoRA: the scheduler that samples it, and the base model it belongs to.

scheduler/scheduler_config.json   a scheduler config for diffusers
base.json                         the identity of the base, the sha256 of the scheduler's config, and a checksum of the file
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.disk.durable import read_json, read_sealed, sha256_json, write_sealed, write_text
from stepdistill.export.scheduler import StudentScheduler
from stepdistill.messages import first_line
from stepdistill.models.identity import BaseIdentity
from stepdistill.teacher.scheduler import is_flow_scheduler, scheduler_problems

logger = logging.getLogger(__name__)
BASE = "base.json"
_SCHEDULER_SHA256 = "scheduler_sha256"
_FIX = "fix: `stepdistill export` writes it again"


def write_facts(folder: Path, scheduler: StudentScheduler, identity: Mapping[str, Any]) -> None:
    """Writes both files; ValueError if one cannot be written."""
    write_text(scheduler_file(folder), scheduler.to_json_string())
    write_sealed(
        folder / BASE, {**identity, _SCHEDULER_SHA256: sha256_json(read_json(scheduler_file(folder)))}
    )


def scheduler_file(folder: Path) -> Path:
    """Path of scheduler/scheduler_config.json in an exported folder."""
    return folder / "scheduler" / "scheduler_config.json"


def read_scheduler(folder: Path) -> StudentScheduler:
    """The scheduler of an exported folder; ValueError if a file is missing or was changed. Folders of an earlier version
    store no sha256 of the config, which is then not checked."""
    file, about = scheduler_file(folder), _read_about(folder)
    config, written = read_json(file), about.get(_SCHEDULER_SHA256)
    if not isinstance(config, dict) or written not in (None, sha256_json(config)):
        raise ValueError(f"{file} is missing or not as it was exported; {_FIX}")
    try:
        return scheduler_of(config)
    except ValueError as error:
        raise ValueError(f"{file} is not a valid scheduler config ({error}); {_FIX}") from None


def scheduler_of(config: Mapping[str, Any]) -> StudentScheduler:
    """The scheduler that a config describes; ValueError of one line if it describes none."""
    problem = next(scheduler_problems(config), None)
    if problem is not None:
        raise ValueError(problem)
    kind = FlowMatchEulerDiscreteScheduler if is_flow_scheduler(config) else DDIMScheduler
    try:
        return kind.from_config(dict(config))
    except Exception as error:  # diffusers and torch raise errors of many types for invalid numbers
        raise ValueError(first_line(error)) from None


def is_exported(folder: Path) -> bool:
    """Whether both files exist and are as they were exported. A damaged file is logged as a warning."""
    if not scheduler_file(folder).exists():
        return False
    try:
        read_scheduler(folder)
        return read_base(folder) is not None
    except ValueError as error:
        logger.warning("%s", error)
        return False


def read_base(folder: Path) -> BaseIdentity | None:
    """The identity of an exported folder's base; None if base.json does not exist, ValueError if it is damaged."""
    return BaseIdentity.of_json(_read_about(folder))


def _read_about(folder: Path) -> dict[str, Any]:
    """The content of base.json; empty if the file does not exist, ValueError if it is damaged."""
    if not (folder / BASE).exists():
        return {}
    about = read_sealed(folder / BASE)
    if about is None or BaseIdentity.of_json(about) is None:
        raise ValueError(f"{folder / BASE} is not as it was exported; {_FIX}")
    return about
