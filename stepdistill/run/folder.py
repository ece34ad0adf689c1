"""The folder of a run: opened before anything costs time, refused where it belongs to another run. No torch."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.saved import resolved, saved_config
from stepdistill.disk.durable import sha256_json, write_text
from stepdistill.disk.places import clear_half_written, half_written
from stepdistill.run.start_from import TAKEN

# What may differ when a run goes on: it changes no weight.
_FREE = (
    "data.max_bad_fraction",
    "data.on_bad",
    "evaluation",
    "export",
    "output_dir",
    "preview",
    "training.logging_steps",
    "training.preview_steps",
)
TEACHER_RECORD = "teacher.json"
"""Says what the teacher's folder in a run's folder was made of."""
# Files at the top of a run's folder, which every process of every stage may write.
_WRITTEN_BY_ALL = ("config.yaml", "environment.json", TEACHER_RECORD, TAKEN, "log.jsonl")


def check_folder(config: RunConfig) -> None:
    """ConfigError where the run's folder is another run's, or holds other files; writes nothing."""
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
            f"{key}: got {now!r}, but {run_dir} is a run with {before!r}{others}; allowed: the same value, "
            f"{run_dir} instead of the config to go on as it was begun, another name=..., or remove that folder"
        )


def _check_empty(run_dir: Path) -> None:
    """ConfigError where a folder without config.yaml holds more than the half of one that a killed start left."""
    if run_dir.is_dir() and not all(map(_is_half_a_config, run_dir.iterdir())):
        raise ConfigError(f"name: {run_dir} holds files that are no run's; choose another name or output_dir")


def _is_half_a_config(path: Path) -> bool:
    return half_written(path) == "config.yaml"


def open_folder(config: RunConfig) -> Path:
    """check_folder, then the folder with config.yaml in it; half-written files that killed starts left there are removed."""
    check_folder(config)
    plain = resolved(config)
    if plain["data"]["held_out"] is None:
        plain["data"]["held_out"] = saved_held_out(config.run_dir)
    saved, text = config.run_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False)
    if not (saved.is_file() and saved.read_bytes() == text.encode("utf-8")):
        write_text(saved, text)
    clear_half_written(config.run_dir, names=_WRITTEN_BY_ALL)
    return config.run_dir


def saved_held_out(run_dir: Path) -> float | None:
    """The data.held_out that a run was begun with; None where it named none, or has not begun."""
    saved = run_dir / "config.yaml"
    data = _saved(run_dir).get("data") if saved.is_file() else None
    return data.get("held_out") if isinstance(data, dict) else None


def config_hash(config: RunConfig) -> str:
    """Of all that a run's weights depend on: equal wherever it lies and whatever is exported or measured of it."""
    settings = {k: v for k, v in _flat(resolved(config)).items() if not _is_free(k)}
    # keys that earlier versions did not have count where they say something
    added = [k for k in settings if k == "start_from" or k.endswith(".objectives")]
    return sha256_json({k: v for k, v in settings.items() if k not in added or v})


def _saved(run_dir: Path) -> dict[str, Any]:
    """A run's config with the defaults of keys that its version did not know; as it is where this version cannot read it."""
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


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    first, second = _flat(before), _flat(now)
    keys = [k for k in {**first, **second} if not _is_free(k)]
    if second.get("data.held_out") is None:  # which goes on with the share that the run was begun with
        keys.remove("data.held_out")
    return [(k, first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)]
