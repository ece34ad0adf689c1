"""Opens the folder of a run, before anything costs time, and refuses a folder of another run. No torch."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.load import setting_text
from stepdistill.config.saved import resolved, saved_config
from stepdistill.disk.durable import write_text
from stepdistill.disk.places import clear_half_written, half_written
from stepdistill.run.checkpoint_files import check_checkpoints
from stepdistill.run.lock import LOCK, is_alone_in
from stepdistill.run.rungs import folders_of_rungs
from stepdistill.run.settings import Difference, differences_text, forbidden_changes
from stepdistill.run.start_from import TAKEN

TEACHER_RECORD = "teacher.json"
"""File in a run's folder that records what its teacher/ was made from."""
PARTS_RECORD = "teacher_parts.json"
"""File in a run's folder with the hash of each part of its teacher."""
# Files at the top of a run's folder that any process of any stage may write, and the mark of runtime.check_shared.
_WRITTEN_BY_ALL = (
    *("config.yaml", "environment.json", "log.jsonl", "shared"),
    *(TEACHER_RECORD, PARTS_RECORD, TAKEN),
)


_OF_A_START = ("config.yaml", "environment.json", "shared", PARTS_RECORD, LOCK)
"""What a command has written when it ends before it has made anything."""


def check_folder(config: RunConfig) -> None:
    """ConfigError if the run's folder belongs to another run or holds unrelated files; CheckpointError if a checkpoint
    depends on settings that have changed. A run that has made nothing yet may change as it likes. Writes nothing."""
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise ConfigError(
                f"name: the run's folder {run_dir} is a file; choose another name or output_dir"
            )
        if not saved.is_file():
            _check_empty(run_dir)
            return
        if _has_made_nothing(run_dir):
            return
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot look into {run_dir}: {error.strerror}; choose another name or output_dir"
        ) from None
    changes = forbidden_changes(_saved(run_dir), resolved(config), finished=folders_of_rungs(run_dir))
    if changes:
        raise ConfigError(_difference(run_dir, changes))
    check_checkpoints(config)


def _difference(run_dir: Path, changes: list[Difference]) -> str:
    """The message for settings that differ from those of the run in the folder."""
    key, before, now = changes[0]
    others = f" (also other: {differences_text(changes[1:])})" if len(changes) > 1 else ""
    with_it = "the default" if before is None else setting_text(key, before)
    same = f"leave {key} out" if before is None else f"use {setting_text(key, before)}"
    got = "nothing" if now is None else repr(now)
    return (
        f"{key}: got {got}, but the run in {run_dir} was started with {with_it}{others}; fix: {same}, or `stepdistill run "
        f"{run_dir}` to continue that run as it was, or another name=... for a new run"
    )


def _check_empty(run_dir: Path) -> None:
    """ConfigError if a folder without config.yaml holds unrelated files. A lock and a half-written config.yaml are allowed:
    a process that was killed at its start leaves them, and one that is starting right now has them."""
    if run_dir.is_dir() and not all(map(_is_of_a_start, run_dir.iterdir())):
        raise ConfigError(f"name: {run_dir} holds files that are no run's; choose another name or output_dir")


def _is_of_a_start(path: Path) -> bool:
    return half_written(path) == "config.yaml" or path.name == LOCK


def _has_made_nothing(run_dir: Path) -> bool:
    return all((half_written(path) or path.name) in _OF_A_START for path in run_dir.iterdir())


def open_folder(config: RunConfig) -> Path:
    """Calls check_folder, then makes the run's folder with its config.yaml, and removes what killed processes half wrote."""
    check_folder(config)
    plain = resolved(config)
    _forget_other_teacher(config)
    if plain["data"]["held_out"] is None:
        plain["data"]["held_out"] = saved_held_out(config.run_dir)
    saved, text = config.run_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False)
    if not (saved.is_file() and saved.read_bytes() == text.encode("utf-8")):
        write_text(saved, text)
    clear_half_written(config.run_dir, names=_WRITTEN_BY_ALL, is_alone=is_alone_in(config.run_dir))
    return config.run_dir


def _forget_other_teacher(config: RunConfig) -> None:
    """Removes the hashes of a teacher with which the run was started, made nothing, and was started again with another."""
    run_dir = config.run_dir
    if not (run_dir / "config.yaml").is_file() or not _has_made_nothing(run_dir):
        return
    before = _saved(run_dir).get("teacher")
    if before != resolved(config)["teacher"]:
        (run_dir / PARTS_RECORD).unlink(missing_ok=True)


def saved_held_out(run_dir: Path) -> float | None:
    """The data.held_out that a run was started with; None if its config has none, or the run has not started."""
    saved = run_dir / "config.yaml"
    data = _saved(run_dir).get("data") if saved.is_file() else None
    return data.get("held_out") if isinstance(data, dict) else None


def _saved(run_dir: Path) -> dict[str, Any]:
    """The saved config of a run, with defaults for keys added since; as saved if this version cannot validate it."""
    raw = saved_config(run_dir)
    try:
        return resolved(RunConfig.model_validate(raw))
    except ValidationError:
        return raw
