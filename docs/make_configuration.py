"""Writes docs/configuration.md from the docstrings of the config's fields.

python docs/make_configuration.py
"""

import json
import sys
from pathlib import Path
from typing import Any

from stepdistill.config import RunConfig
from stepdistill.config.schema import affects
from stepdistill.config.section import Affects

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

A run is one YAML file. Each key stands under its section, with the values it takes, its default and what it does. Every
command takes `key=value` after the file's name, such as `training.train_batch_size=8`; in a list, a number names the entry:
`ladder.0.phases.0.max_train_steps=100`. A wrong key or value stops the command with one line that names it and what is
allowed. `python docs/make_configuration.py` writes this page from the fields in the package.

Once a run has started, settings that its weights depend on stay as they are; the exceptions are marked:

- may change: no trained weight depends on it.
- may change until its rung is finished: finished rungs are kept, and the rung is trained with the new value. If a checkpoint
  of the rung depends on the old value, the command stops, lists each changed setting, and names the checkpoints to remove;
  the state at the start of a phase does not depend on that phase's settings, so training then continues there.
- may change with the other one: `train_batch_size` times `gradient_accumulation_steps` times the number of processes stays
  the same.
"""
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
_CHANGES = {
    Affects.NOTHING: "may change",
    Affects.ITS_RUNG: "may change until its rung is finished",
    Affects.SPLIT: "may change with the other one",
}
_TYPES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def configuration() -> str:
    """The text of docs/configuration.md: each section of the config, and each key with its values, default and meaning."""
    schema = RunConfig.model_json_schema()
    sections: list[tuple[str, dict[str, Any]]] = [("", schema)]
    parts = [HEAD]
    while sections:
        path, section = sections.pop(0)
        parts.append(f"## {f'`{path}`' if path else 'The run'}\n")
        if path and section.get("description"):
            parts.append(" ".join(section["description"].split()) + "\n")
        nested = []
        for name, field in section["properties"].items():
            key = f"{path}.{name}" if path else name
            inner, is_list = _section_of(field, schema)
            if inner is not None:
                nested.append((f"{key}.N" if is_list else key, inner))
            parts.append(_entry(key, field, schema, required=name in section.get("required", [])))
        sections = nested + sections
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _entry(key: str, field: dict[str, Any], schema: dict[str, Any], *, required: bool) -> str:
    inner, is_list = _section_of(field, schema)
    if inner is not None:
        values = f"list of sections, see `{key}.N`" if is_list else "section, see below"
        if "anyOf" in field:
            values += ", or null"
    else:
        values = _values(field, schema)
    default = "required" if required else None
    if "default" in field and (inner is None or "anyOf" in field):
        default = f"default {_shown(field.get('default'))}"
    about = " ".join((field.get("description") or (inner or {}).get("description") or "").split())
    change = _CHANGES.get(affects(key.replace(".N", ".0"))) if inner is None else None
    facts = ", ".join(part for part in (values, default, change) if part)
    return f"- `{key}` ({facts}): {about}"


def _section_of(field: dict[str, Any], schema: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The schema of the section that a field holds (None for a plain value), and whether the field is a list of sections."""
    value, is_list = field, False
    if field.get("type") == "array" and "$ref" in field.get("items", {}):
        value, is_list = field["items"], True
    if "anyOf" in field:  # a section that may be left out
        value = next((choice for choice in field["anyOf"] if "$ref" in choice), field)
    if "$ref" not in value:
        return None, False
    section = schema["$defs"][value["$ref"].rpartition("/")[2]]
    return (section, is_list) if "properties" in section else (None, False)


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in field:
        return _values(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(choice, schema) for choice in field["anyOf"]))
    if "enum" in field:
        return " | ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}, each {_values(field['prefixItems'][0], schema)}"
        return f"list, each {_values(field['items'], schema)}"
    if field.get("type") == "object":
        return "mapping"
    kind = _TYPES[field["type"]]
    bounds = [f"{sign} {field[name]:,}" for name, sign in _BOUNDS.items() if name in field]
    return " ".join([kind, " and ".join(bounds)]) if bounds and field["type"] != "string" else kind


def _shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def main() -> int:
    """Writes docs/configuration.md."""
    PAGE.write_text(configuration(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
