"""Where a dotted key such as ladder.0.phases.1.learning_rate stands in the config: its section, its field, and which
trained weights depend on it. No torch."""

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from stepdistill.config.section import Affects, Section
from stepdistill.config.sections import RunConfig


def section_at(location: Iterable[int | str]) -> type[Section]:
    """The class of the section at a place in the config; of the nearest one above it if there is no such place."""
    section: type[Section] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))
        section = (None if field is None else section_in(field.annotation)) or section
    return section


def all_keys(section: type[Section] = RunConfig, above: str = "") -> Iterator[str]:
    """The dotted keys of all fields, with N for the number of an entry, such as ladder.N.phases.N.learning_rate."""
    for name, field in section.model_fields.items():
        key = f"{above}{name}"
        yield key
        inner = section_in(field.annotation)
        if inner is not None:
            is_list = "tuple" in str(field.annotation)
            yield from all_keys(inner, f"{key}.N." if is_list else f"{key}.")


def holds_text(key: str) -> bool:
    """Whether the field at a dotted key is text, such as teacher.revision: 7112e88 is then a commit and not a number."""
    *parents, last = key.split(".")
    field = section_at(parents).model_fields.get(last)
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def affects(key: str) -> Affects:
    """What the value at a dotted key of a resolved config affects; EVERY_RUNG for a key that no section has."""
    section: type[Section] = RunConfig
    answer = section.affects
    for part in key.split("."):
        field = section.model_fields.get(part)
        if field is None:
            continue  # the number of an entry in a list, or a key inside a mapping
        answer = field_affects(field) or answer
        inner = section_in(field.annotation)
        if inner is not None:
            section, answer = inner, inner.affects
    return answer or Affects.EVERY_RUNG


def field_affects(field: FieldInfo) -> Affects | None:
    """What a field's own definition says; None if it says nothing, so that its section's class says it."""
    return next((part for part in field.metadata if isinstance(part, Affects)), None)


def section_in(annotation: Any) -> type[Section] | None:
    """The section class in a field's annotation, which may be the class itself, a tuple of it, or a union with None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    sections = (section_in(argument) for argument in get_args(annotation))
    return next((section for section in sections if section is not None), None)
