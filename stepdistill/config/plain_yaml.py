"""Reads YAML that anybody may have written: plain data only, with limits, so that no text costs much. No torch."""

from typing import Any

import yaml

from stepdistill.messages import short, without_secrets

MAX_CHARACTERS = 2**20
"""Most characters of a text, and of all its values together; a value that an alias repeats counts each time."""
MAX_VALUES = 10_000
"""Most keys, values, lists and mappings together; what an alias repeats counts each time."""
DEEPEST = 50
"""Most lists and mappings inside each other; a run's config has 7."""
LONGEST_NUMBER = 100
"""Most characters of a number."""
_LONGEST_MESSAGE = 500
_STANDARD = "tag:yaml.org,2002:"
"""The beginning of YAML's own tags, which a text writes as !!bool or !!int."""
_NUMBERS = (f"{_STANDARD}int", f"{_STANDARD}float")
_TEXTS = tuple(f"{_STANDARD}{name}" for name in ("str", "bool", "null", "timestamp", "binary"))
"""Tags of values that are written as one text, not as a list or mapping; numbers are listed above."""
_OF_A_VALUE = (ValueError, OverflowError, LookupError, AttributeError, TypeError)
"""Errors, besides PyYAML's own, that PyYAML raises if a value does not fit its tag."""


def plain_yaml(text: str) -> Any:
    """The plain data of a YAML text. YAMLError of one line, with the number of the text's line, if it is not valid YAML,
    exceeds a limit, gives a key twice, or holds a value that its tag cannot have, such as a date that does not exist."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters; allowed: up to {MAX_CHARACTERS}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        except _OF_A_VALUE as error:  # such as an escape that is no character, or a version of 5,000 digits
            raise yaml.YAMLError(f"line {loader.line + 1}: it cannot be read: {error}") from None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise yaml.YAMLError(_in_one_line(str(error))) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data with the limits of this file. It counts while it reads, before any value is made."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._characters = self._depth = 0
        self._sizes: dict[str, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node of the text, counted with everything inside it."""
        event: Any = self.peek_event()
        before = (self._values, self._characters)
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            values, characters = self._sizes.get(str(event.anchor), (0, 0))
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _refused(event.start_mark, f"*{event.anchor} is inside the value that it repeats")
            self._count(event.start_mark, values, characters)
        else:
            self._count(event.start_mark, 1, len(getattr(event, "value", "")))
        node = super().compose_node(parent, index)
        self._depth -= 1
        anchor = getattr(event, "anchor", None)
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._sizes[str(anchor)] = (self._values - before[0], self._characters - before[1])
        return node

    def _count(self, mark: Any, values: int, characters: int) -> None:
        self._values += values
        self._characters += characters
        if self._depth > DEEPEST:
            raise _refused(mark, f"more than {DEEPEST} lists and mappings are inside each other")
        if self._values > MAX_VALUES:
            raise _refused(mark, f"more than {MAX_VALUES} values, those that aliases repeat included")
        if self._characters > MAX_CHARACTERS:
            raise _refused(mark, f"more than {MAX_CHARACTERS} characters in values, with aliases written out")

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping; YAMLError if one of its keys is there twice, because YAML's readers keep only the last value."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            name = (key.tag, key.value)
            if name in lines:
                first = f"first in line {lines[name] + 1}; allowed: once"
                raise _refused(key.start_mark, f"the key {short(key.value)} is there twice, {first}")
            lines[name] = key.start_mark.line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The plain value of a node; YAMLError with its line for a value that its tag cannot have."""
        tag = node.tag.replace(_STANDARD, "!!")
        if node.tag in (*_NUMBERS, *_TEXTS) and not isinstance(node, yaml.ScalarNode):
            raise _refused(node.start_mark, f"a list or a mapping cannot be read as {tag}")
        if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise _refused(
                node.start_mark, f"a number of {len(node.value)} characters; allowed: up to {LONGEST_NUMBER}"
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise _refused(node.start_mark, f"{short(node.value)} cannot be read: {error}") from None
        except _OF_A_VALUE:  # whose text names parts of PyYAML
            raise _refused(node.start_mark, f"{short(node.value)} cannot be read as {tag}") from None


def _in_one_line(message: str) -> str:
    """An error's message without line ends, and cut if it repeats a long tag or name."""
    line = " ".join(without_secrets(message).replace(' in "<unicode string>",', " in").split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}..."


def _refused(mark: Any, why: str) -> yaml.YAMLError:
    """An error at a place of the text (a Mark of PyYAML, which counts lines from 0)."""
    return yaml.YAMLError(f"line {mark.line + 1}: {why}")
