"""What all sections of a config share: frozen, strict about keys and numbers; the error that names a wrong one. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

MOST_STEPS = 1000
"""A sampler of Stable Diffusion's 1000 timesteps has no more steps."""
_MOST_IN_A_COMPONENT, _MOST_IN_A_PATH = 255, 4096  # bytes, of Linux and of nearly every other file system


class ConfigError(ValueError):
    """A config that cannot run; the message names the key, the value got and what is allowed."""


def _usable_path(text: str) -> str:
    """ValueError for what no file system takes, and for the home of a user who is not there."""
    if not text:
        raise ValueError("a path of one letter or more")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ValueError("~ or ~USER, a user of this machine, at the start of a path") from None
    longest = max((len(part.encode()) for part in path.parts), default=0)
    if longest > _MOST_IN_A_COMPONENT or len(str(path).encode()) > _MOST_IN_A_PATH:
        raise ValueError(
            f"a path of up to {_MOST_IN_A_PATH} bytes, up to {_MOST_IN_A_COMPONENT} between two slashes"
        )
    return text


PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
PositiveFloat = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
BatchSize = Annotated[int, Field(gt=0, le=4096)]
Rank = Annotated[int, Field(gt=0, le=4096)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=150)]
"""Part of file names, which end at 255 bytes."""
FilePath = Annotated[str, AfterValidator(_usable_path)]


class Section(BaseModel):
    """Base of all sections: frozen, strict about keys; numbers are finite, texts are what a file can hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        for text in _texts(value):
            if "\0" in text:
                raise ValueError("text without NUL characters")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("text that can be written as UTF-8") from None
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        yield from (part for part in value if isinstance(part, str))
