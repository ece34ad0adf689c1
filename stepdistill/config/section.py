"""The base class of all config sections, value types that they share, and ConfigError. No torch."""

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from stepdistill.messages import without_secrets

MAX_STEPS = 1000
"""Largest number of sampling steps: Stable Diffusion has 1000 timesteps."""
_MAX_IN_A_COMPONENT, _MAX_IN_A_PATH = (
    255,
    4096,
)  # bytes; limits of Linux and of nearly every other file system


class ConfigError(ValueError):
    """A config that cannot run; the message names the key, the value it got and what is allowed."""


def _usable_path(text: str) -> str:
    """The text itself; ValueError if no file system takes it as a path, or if it begins with ~USER of an unknown user."""
    if not text:
        raise ValueError("a path of one letter or more")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ValueError("~ or ~USER, a user of this machine, at the start of a path") from None
    longest = max((len(part.encode()) for part in path.parts), default=0)
    if longest > _MAX_IN_A_COMPONENT or len(str(path).encode()) > _MAX_IN_A_PATH:
        raise ValueError(
            f"a path of up to {_MAX_IN_A_PATH} bytes, up to {_MAX_IN_A_COMPONENT} between two slashes"
        )
    return text


def _expanded(text: str) -> str:
    kind, colon, path = text.partition(":~")
    return f"{kind}:{Path('~' + path).expanduser()}" if colon else str(Path(text).expanduser())


PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
PositiveFloat = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, le=1000)]
"""Far above any rate that trains; Adam cannot compute with much larger ones in float32."""
Steps = Annotated[int, Field(gt=0, le=MAX_STEPS)]
BatchSize = Annotated[int, Field(gt=0, le=4096)]
Rank = Annotated[int, Field(gt=0, le=4096)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=150)]
"""A name that becomes part of file names, which have at most 255 bytes."""
FilePath = Annotated[str, AfterValidator(_usable_path)]
"""A path exactly as the config has it, because the text is part of a cache's key. The code that opens it expands ~."""
ExpandedPath = Annotated[FilePath, AfterValidator(_expanded)]
"""A path, or KIND:PATH, in which ~ at the start of the path is already the home folder."""


class Affects(Enum):
    """Which trained weights a setting affects, and so whether it may change after a run has started.

    Each section's class names one for its fields, as in `class Export(Section, affects=Affects.NOTHING)`; a field for which
    that is wrong has its own in its annotation.
    """

    EVERY_RUNG = "every rung"
    """Stays as it is."""
    ITS_RUNG = "its rung"
    """May change while the rung is not finished; a checkpoint that depends on it then refuses."""
    SPLIT = "the split of an update's samples"
    """May change as long as an update has the same number of samples over all processes."""
    NOTHING = "nothing"
    """May change at any time."""


class Section(BaseModel):
    """Base of all sections: frozen; rejects unknown keys, infinite numbers and nan, secrets, and text that is not UTF-8."""

    affects: ClassVar[Affects | None] = None
    """What the section's fields affect; None if each field says it, or is a section."""

    def __init_subclass__(cls, *, affects: Affects | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.affects = affects

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        """Refuses a text, or a list with a text, before other checks read it. What a section holds, it checks itself."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str):
                _check_text(text)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _plain_texts_inside(cls, value: Any) -> Any:
        """Refuses texts in mappings and in other lists, and what YAML gave in another form than text, such as !!binary."""
        for text in _texts(value):
            _check_text(text)
        return value


def _check_text(text: str) -> None:
    """ValueError if a text has NUL characters, what may be a secret, or characters that UTF-8 lacks."""
    if "\0" in text:
        raise ValueError("text without NUL characters")
    if without_secrets(text) != text:
        raise ValueError(
            "text without a token or password, because configs are saved and shown; `hf auth login` and the "
            "environment's HF_TOKEN are for tokens"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text that can be written as UTF-8") from None


def _texts(value: Any) -> Iterator[str]:
    """All texts inside plain data, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (*_texts(key), *_texts(inner))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _texts(inner)
