"""What an exported folder says of itself beside its LoRA: the scheduler that samples it and the base that it belongs to.

scheduler/scheduler_config.json   as diffusers reads it
base.json                         the identity of the base, the sha256 of the scheduler's config, a checksum
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from stepdistill.disk.durable import read_json, read_sealed, sha256_json, write_sealed, write_text
from stepdistill.models.identity import BaseIdentity

logger = logging.getLogger(__name__)
BASE = "base.json"
_SCHEDULER_SHA256 = "scheduler_sha256"
_MEND = "mend: `stepdistill export` writes it again"


def write_facts(folder: Path, scheduler: DDIMScheduler, identity: Mapping[str, Any]) -> None:
    """Writes both files; ValueError where one cannot be written."""
    write_text(scheduler_file(folder), scheduler.to_json_string())
    write_sealed(
        folder / BASE, {**identity, _SCHEDULER_SHA256: sha256_json(read_json(scheduler_file(folder)))}
    )


def scheduler_file(folder: Path) -> Path:
    """scheduler/scheduler_config.json of an exported folder."""
    return folder / "scheduler" / "scheduler_config.json"


def read_scheduler(folder: Path) -> DDIMScheduler:
    """The scheduler of an exported folder; ValueError where a file is missing or was changed. A folder of an earlier version
    has no sha256 of the scheduler, which is taken as it is."""
    file, about = scheduler_file(folder), _read_about(folder)
    config, written = read_json(file), about.get(_SCHEDULER_SHA256)
    if not isinstance(config, dict) or written not in (None, sha256_json(config)):
        raise ValueError(f"{file} is missing or not as it was exported; {_MEND}")
    try:
        return DDIMScheduler.from_config(config)
    except Exception as error:  # numbers that diffusers and torch cannot compute with raise what they lead to
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} describes no scheduler ({reason}); {_MEND}") from None


def is_exported(folder: Path) -> bool:
    """Whether both files are there and as they were exported; warned of where one is there and is not."""
    if not scheduler_file(folder).exists():
        return False
    try:
        read_scheduler(folder)
        return read_base(folder) is not None
    except ValueError as error:
        logger.warning("%s", error)
        return False


def read_base(folder: Path) -> BaseIdentity | None:
    """The base of an exported folder, None where an earlier version said nothing of it; ValueError where it is damaged."""
    return BaseIdentity.of_json(_read_about(folder))


def _read_about(folder: Path) -> dict[str, Any]:
    """base.json, empty where there is none; ValueError where it is damaged."""
    if not (folder / BASE).exists():
        return {}
    about = read_sealed(folder / BASE)
    if about is None or BaseIdentity.of_json(about) is None:
        raise ValueError(f"{folder / BASE} is not as it was exported; {_MEND}")
    return about
