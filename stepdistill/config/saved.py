"""The config as plain data, and the config.yaml that every run's folder holds. No torch."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig

_MEND = "mend: put back a copy of it, or the YAML file that the run was started with"
_MOST_NODES = 100_000
_DEEPEST = 1000
"""Most brackets that may be open at once: the time of Python's YAML parser grows with the square of their number."""


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
            f"{run_dir / 'config.yaml'} is not the config of a run: {where}: {why}; {_MEND}"
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
        raw = plain_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}; {_MEND}") from None
    if not isinstance(raw, dict) or not _is_small(raw):
        raise ConfigError(f"{path} is not the config of a run; {_MEND}")
    return raw


def plain_yaml(text: str) -> Any:
    """The plain data of a YAML text. Raises what yaml.safe_load raises; YAMLError for brackets nested too deeply."""
    depth = 0
    for bracket in re.finditer(r"[\[{}\]]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} brackets are open at once")
    return yaml.safe_load(text)


def _is_small(value: Any) -> bool:
    """Whether plain data has at most _MOST_NODES nodes; one that the YAML repeats by an alias counts each time."""
    waiting, seen = [value], 0
    while waiting and seen <= _MOST_NODES:
        node, seen = waiting.pop(), seen + 1
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return seen <= _MOST_NODES
