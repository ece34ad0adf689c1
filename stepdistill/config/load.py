"""Reads a config from its file and applies overrides; names a mistake in one line, with the nearest known key. No torch."""

import contextlib
import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.ladder import TAP_PATTERN, Phase, WeightedObjective
from stepdistill.config.plain_yaml import plain_yaml
from stepdistill.config.saved import read_run_config, resolved
from stepdistill.config.schema import all_keys, holds_text, section_at
from stepdistill.config.section import NAME_PATTERN
from stepdistill.config.shipped import shipped_configs
from stepdistill.config.shrink import PART_PATTERN
from stepdistill.disk.places import is_folder
from stepdistill.messages import short

_MAX_BYTES = 2**22
_ALLOWED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "too_short": "a list with at least one entry",
    "model_type": "a section: a mapping of keys to values",
    "tuple_type": "a list, such as [a, b]",
    "too_long": "at most {max_length} entries",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
}
"""What a message names as allowed, by pydantic's error type: for errors whose own text speaks of Python or of inputs. Names
in braces are of the error's context."""
_TEXTS = {
    NAME_PATTERN: "letters, digits and . _ -, of which the first is a letter or a digit",
    TAP_PATTERN: "encoder, middle, decoder, or a module's name: letters, digits, _ and ., of which the first is no digit",
    PART_PATTERN: "middle, middle.end, or level.L with .pair.K, .layer.K, .encoder.layer.K or .decoder.layer.K",
}
"""What a message names as allowed, by the pattern that a text does not have."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config of a YAML file, of a run's folder or of a shipped config's name such as "letters", with overrides such as
    `ladder.0.phases.0.max_train_steps=5` applied; ConfigError if anything is wrong."""
    path = Path(path)
    named = None if path.is_file() or (path / "config.yaml").is_file() else shipped_configs().get(str(path))
    raw = resolved(read_run_config(path)) if named is None and is_folder(path) else _read(named or path)
    for override in overrides or []:
        raw = _overridden(raw, override)
    return parse_config(raw)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        shipped = shipped_configs()
        near = difflib.get_close_matches(path.stem, shipped, n=1)
        hint = f"; did you mean {near[0]}, which ships with stepdistill?" if near else ""
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileNotFoundError):
            raise ConfigError(
                f"{path}: there is no such config file, run folder or config that ships with stepdistill "
                f"({', '.join(shipped)}){hint}"
            ) from None
        raise ConfigError(f"cannot read the config {path}: {reason}{hint}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"the config {path} has more than {_MAX_BYTES} bytes; allowed: the YAML of a run")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"the config {path} is not UTF-8 text") from None
    try:
        raw = plain_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: got {type(raw).__name__}; allowed: a mapping of keys such as name, ladder"
        )
    return raw


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """A RunConfig from plain data; ConfigError with one clear line about the first mistake."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def changed(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> RunConfig:
    """The config from plain data with new values at dotted keys such as ladder.0.node_steps; ConfigError if it is wrong."""
    plain = dict(raw)
    for key, value in changes.items():
        plain = _with(plain, key, value, f"setting {key}")
    return parse_config(plain)


def setting_at(raw: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of plain data; ConfigError if the key does not exist."""
    node: Any = raw
    for part in key.split("."):
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ConfigError(f"{key}: got nothing; this config has no such key") from None
    return node


def setting_text(key: str, value: Any) -> str:
    """A setting in the form that the command line takes, such as ladder.0.phases.0.max_train_steps=5."""
    text = yaml.dump(value, Dumper=_NoAliases, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


class _NoAliases(yaml.SafeDumper):
    """A YAML dumper that writes a repeated part in full each time, not as an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _overridden(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {short(override)}: allowed: key=value, such as training.train_batch_size=16"
        )
    try:
        value = plain_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {short(override)}: the value is not valid YAML: {error}") from None
    if isinstance(value, str) and not holds_text(key):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    return _with(raw, key, value, f"override {short(override)}")


def _with(raw: Mapping[str, Any], key: str, value: Any, what: str) -> dict[str, Any]:
    """A copy of plain data with a new value at a dotted key: containers on the path are copied, all others are shared."""
    changed_data = dict(raw)
    node: Any = changed_data
    *parents, last = key.split(".")
    for part in parents:
        place = _list_index(node, part, what) if isinstance(node, list) else part
        inner = node.get(place, {}) if isinstance(node, dict) else node[place]
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{what}: {part} holds {short(inner)}, which has no keys below it")
        node[place] = copy.copy(inner)
        node = node[place]
    node[_list_index(node, last, what) if isinstance(node, list) else last] = value
    return changed_data


def _list_index(node: list[Any], part: str, what: str) -> int:
    if part not in map(str, range(len(node))):
        raise ConfigError(f"{what}: got {part!r} for a list; allowed: 0 to {len(node) - 1}")
    return int(part)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    kind, message, got = first["type"], first["msg"], first.get("input")
    if isinstance(first.get("ctx", {}).get("error"), ConfigError):
        return str(first["ctx"]["error"])
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])
        if section_at(first["loc"][:-1]) is Phase and name in WeightedObjective.model_fields:
            return (
                f"{location}: got {short(got)}, a key of one objective; allowed: "
                f"objectives=[{{kind: NAME, {name}: {short(got)}}}] in place of objective"
            )
        allowed_keys = _known_keys(first["loc"][:-1])
        nearest = _nearest(name, allowed_keys)
        hint = "" if nearest is None else f"nearest: {nearest}; "
        return f"{location}: got an unknown key with value {short(got)}; {hint}allowed: {', '.join(allowed_keys)}"
    if kind == "missing":
        return f"{location}: got nothing; a value is required"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
    context = first.get("ctx", {})
    message = _TEXTS.get(context.get("pattern", ""), message.removeprefix("Input should be "))
    message = _ALLOWED.get(kind, message[0].lower() + message[1:])
    return f"{location}: got {short(got)} ({type(got).__name__}); allowed: {_filled(message, context)}"


def _filled(text: str, context: Mapping[str, Any]) -> str:
    """The text with the numbers of its context; a text without a place for one as it is."""
    for name, value in context.items():
        text = text.replace(f"{{{name}}}", f"{value:g}" if isinstance(value, float) else str(value))
    return text


def _nearest(name: str, allowed_keys: list[str]) -> str | None:
    """The key of the section whose name is most like this one, else the dotted keys elsewhere in the config that have such a
    name; None if nothing is like it."""
    here = difflib.get_close_matches(name, allowed_keys, n=1)
    if here:
        return here[0]
    by_name: dict[str, list[str]] = {}
    for key in all_keys():
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    elsewhere = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    return " or ".join(by_name[elsewhere[0]]) if elsewhere else None


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a place in the config, such as ("teacher", "loras", 0)."""
    return sorted(section_at(location).model_fields)
