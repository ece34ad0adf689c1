"""A config read from its file, with overrides; every mistake in one line with the nearest known key. No torch."""

import contextlib
import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig, Section
from stepdistill.messages import first_line, short
from stepdistill.places import is_folder
from stepdistill.run_folder import read_run_config, resolved

_MOST_BYTES = 2**22
# What PyYAML raises at dates that do not exist, numbers too long for Python, and lists in lists in lists.
_UNREADABLE = (ValueError, RecursionError, OverflowError)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config of a YAML file, or of a run's folder, with overrides such as `ladder.0.phases.0.max_train_steps=5`;
    ConfigError."""
    path = Path(path)
    raw = resolved(read_run_config(path)) if is_folder(path) else _read(path)
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in Path("configs").glob("*.yaml")], n=1)
        hint = f"; did you mean configs/{near[0]}?" if near else ""
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the config {path}: {said}{hint}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"the config {path} has more than {_MOST_BYTES} bytes; allowed: the YAML of a run")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"the config {path} is not UTF-8 text") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except _UNREADABLE as error:
        raise ConfigError(f"{path} holds a value that cannot be read: {first_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: got {type(raw).__name__}; allowed: a mapping of keys such as name, ladder"
        )
    return raw


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """A RunConfig of plain data; ConfigError with one clear line for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {short(override)}: allowed: key=value, such as training.train_batch_size=16"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, *_UNREADABLE):
        raise ConfigError(f"override {short(override)}: the value is not valid YAML") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    node: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override {short(override)}: {part} holds {short(node)}, which has no keys below it"
            )
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _list_index(node: list[Any], part: str, override: str) -> int:
    if part not in map(str, range(len(node))):
        raise ConfigError(
            f"override {short(override)}: got {part!r} for a list; allowed: 0 to {len(node) - 1}"
        )
    return int(part)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    kind, message, got = first["type"], first["msg"], first.get("input")
    if isinstance(first.get("ctx", {}).get("error"), ConfigError):
        return str(first["ctx"]["error"])
    if kind == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        hint = f"nearest: {nearest[0]}; " if nearest else ""
        return f"{location}: got an unknown key with value {short(got)}; {hint}allowed: {', '.join(known)}"
    if kind == "missing":
        return f"{location}: got nothing; a value is required"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
    return f"{location}: got {short(got)} ({type(got).__name__}); allowed: {message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a place in the config, such as ("teacher", "loras", 0)."""
    section: type[Section] = RunConfig
    for part in location:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation) or section
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, in a tuple, or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    sections = (_section_in(argument) for argument in get_args(annotation))
    return next((section for section in sections if section is not None), None)
