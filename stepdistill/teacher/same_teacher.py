"""Every stage of a run works with one teacher: RUN/teacher_parts.json records the hash of each of its parts when the run is
started, and each later stage compares. No torch.

Otherwise a rung could be trained on top of a rung of another base model, and one table could compare two teachers.
"""

from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_sealed, warn_of_damage, write_sealed
from stepdistill.disk.places import clear_half_written
from stepdistill.run.folder import PARTS_RECORD
from stepdistill.run.rungs import RungRecord, rung_folder
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.fingerprints import network_fingerprint, part_fingerprints

_ALLOWED = (
    "allowed: the teacher that this run was started with, or another name=... for a run with this teacher"
)


def check_same_teacher(config: RunConfig, folder: Path, *, base: Path | None = None) -> None:
    """ConfigError if the teacher in `folder` is not the one that the run was started with, or its rungs were trained on
    another model than `base`, by default the teacher. A smaller base that is not there is not compared: it is made again.

    A run without a record, as earlier versions left it, passes if its finished rungs belong to this teacher's U-Net.
    """
    if base is None or base.is_dir():
        _check_rungs(config, folder if base is None else base)
    stored = _recorded(config.run_dir / PARTS_RECORD)
    if stored is None:
        return
    now = part_fingerprints(folder)
    changed = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if changed:
        raise ConfigError(
            f"teacher.path: {', '.join(changed)} of {config.teacher.path!r} changed since {config.run_dir} was started; "
            f"{_ALLOWED}"
        )


def record_teacher(config: RunConfig, folder: Path) -> None:
    """Writes teacher_parts.json, unless it is there or the run's folder is not."""
    path = config.run_dir / PARTS_RECORD
    if not (config.run_dir / "config.yaml").is_file() or _recorded(path) is not None:
        return
    if path.exists():
        warn_of_damage(path, "it is written again, for the teacher as it is now")
    clear_half_written(config.run_dir, names=(PARTS_RECORD,))
    write_sealed(path, {"parts": part_fingerprints(folder)})


def _recorded(path: Path) -> dict[str, Any] | None:
    """The fingerprints by part in a teacher_parts.json; None if it is missing or damaged."""
    parts = (read_sealed(path) or {}).get("parts")
    return parts if isinstance(parts, dict) else None


def _check_rungs(config: RunConfig, folder: Path) -> None:
    """ConfigError if a finished rung was trained on another U-Net than the one in `folder`."""
    for rung in config.ladder:
        record = RungRecord.read(rung_folder(config.run_dir, rung.student_steps))
        if record is not None and record.base_fingerprint != network_fingerprint(folder):
            shown = config.teacher.path if config.shrink is None else str(folder)
            part = TeacherFacts.of_folder(folder).network_part
            raise ConfigError(
                f"teacher.path: the weights in {part}/ of {shown!r} are not those that the "
                f"{rung.student_steps}-step rung in {config.run_dir} was trained on; {_ALLOWED}"
            )
