"""The config as plain data, and the config.yaml that every run's folder holds. No torch."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.plain_yaml import MAX_CHARACTERS, plain_yaml

_FIX = "fix: put back a copy of it, or the YAML file that the run was started with"


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config with every default filled in, as plain data."""
    return config.model_dump(mode="json")


def read_run_config(run_dir: Path) -> RunConfig:
    """The config that a run was started with, from the run's folder; ConfigError if that is not a run's folder."""
    raw = saved_config(run_dir)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where, why = ".".join(map(str, first["loc"])), " ".join(first["msg"].split())
        raise ConfigError(
            f"{run_dir / 'config.yaml'} is not the config of a run: {where}: {why}; {_FIX}"
        ) from None
    return config.model_copy(update={"name": run_dir.resolve().name, "output_dir": str(run_dir.parent)})


def saved_config(run_dir: Path) -> dict[str, Any]:
    """config.yaml of a run as plain data, not validated; ConfigError in one line if it is missing or not a mapping."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} is not the folder of a run: it has no config.yaml; the folder of a run is output_dir/name"
        )
    try:
        with path.open("rb") as file:
            raw = plain_yaml(file.read(4 * MAX_CHARACTERS + 1).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}; {_FIX}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not the config of a run; {_FIX}")
    return raw
