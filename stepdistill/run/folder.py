"""Opens the folder of a run, before anything costs time, and refuses a folder of another run. No torch."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.saved import resolved, saved_config
from stepdistill.disk.durable import sha256_json, write_text
from stepdistill.disk.places import clear_half_written, half_written
from stepdistill.run.lock import LOCK, is_alone
from stepdistill.run.start_from import TAKEN

# Settings that may differ when a run is continued, because no trained weight depends on them.
_MAY_CHANGE = (
    "data.max_bad_fraction",
    "data.on_bad",
    "evaluation",
    "export",
    "output_dir",
    "preview",
    "training.checkpoint",
    "training.logging_steps",
    "training.max_minutes",
    "training.preview_steps",
)
TEACHER_RECORD = "teacher.json"
"""File in a run's folder that records what its teacher/ was made from."""
# Files at the top of a run's folder that any process of any stage may write.
_WRITTEN_BY_ALL = ("config.yaml", "environment.json", TEACHER_RECORD, TAKEN, "log.jsonl")


def check_folder(config: RunConfig) -> None:
    """ConfigError if the run's folder belongs to another run or holds unrelated files; writes nothing."""
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
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot look into {run_dir}: {error.strerror}; choose another name or output_dir"
        ) from None
    differing = _differences(_saved(run_dir), resolved(config))
    if differing:
        key, before, now = differing[0]
        rest = [name for name, _, _ in differing[1:]]
        more = f", and {len(rest) - 8} more" if len(rest) > 8 else ""
        others = f" (also other: {', '.join(rest[:8])}{more})" if rest else ""
        raise ConfigError(
            f"{key}: got {now!r}, but {run_dir} is a run with {before!r}{others}; allowed: the same value, {run_dir} in "
            f"place of the config file to continue that run with its own settings, another name=..., or removing that folder"
        )


def _check_empty(run_dir: Path) -> None:
    """ConfigError if a folder without config.yaml holds anything but what a process leaves that is killed before it has
    written config.yaml, or that is starting right now."""
    if run_dir.is_dir() and not all(map(_is_of_a_start, run_dir.iterdir())):
        raise ConfigError(f"name: {run_dir} holds files that are no run's; choose another name or output_dir")


def _is_of_a_start(path: Path) -> bool:
    return half_written(path) == "config.yaml" or path.name == LOCK


def open_folder(config: RunConfig) -> Path:
    """Calls check_folder, then makes the run's folder with its config.yaml, and removes what killed processes half wrote."""
    check_folder(config)
    plain = resolved(config)
    if plain["data"]["held_out"] is None:
        plain["data"]["held_out"] = saved_held_out(config.run_dir)
    saved, text = config.run_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False)
    if not (saved.is_file() and saved.read_bytes() == text.encode("utf-8")):
        write_text(saved, text)
    clear_half_written(config.run_dir, names=_WRITTEN_BY_ALL, is_alone=is_alone())
    return config.run_dir


def saved_held_out(run_dir: Path) -> float | None:
    """The data.held_out that a run was started with; None if its config has none, or the run has not started."""
    saved = run_dir / "config.yaml"
    data = _saved(run_dir).get("data") if saved.is_file() else None
    return data.get("held_out") if isinstance(data, dict) else None


def config_hash(config: RunConfig) -> str:
    """A hash of all settings that a run's weights depend on; the run's place, exports and evaluation do not change it."""
    settings = {k: v for k, v in _flat(resolved(config)).items() if not _may_change(k)}
    # keys that earlier versions did not have: part of the hash only if they are set
    added = [k for k in settings if k == "start_from" or k.endswith(".objectives")]
    return sha256_json({k: v for k, v in settings.items() if k not in added or v})


def _saved(run_dir: Path) -> dict[str, Any]:
    """The saved config of a run, with defaults for keys added since; as saved if this version cannot validate it."""
    raw = saved_config(run_dir)
    try:
        return resolved(RunConfig.model_validate(raw))
    except ValidationError:
        return raw


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v
            for name, part in value.items()
            for k, v in _flat(part, f"{key}.{name}" if key else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for index, part in enumerate(value) for k, v in _flat(part, f"{key}.{index}").items()}
    return {key: value}


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _MAY_CHANGE)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    first, second = _flat(before), _flat(now)
    keys = [k for k in {**first, **second} if not _may_change(k)]
    if second.get("data.held_out") is None:  # the run continues with the share that it was started with
        keys.remove("data.held_out")
    return [(k, first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)]
