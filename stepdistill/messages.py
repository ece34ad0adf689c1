"""Makes values, file names and errors of other libraries fit into a one-line message, whatever they contain. No torch."""

import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any

_LONGEST_ERROR = 300
_SHORTEST_SECRET = 16
_SECRET_NAME = re.compile("(TOKEN|SECRET|PASSWORD|KEY)$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(\b[a-zA-Z][\w+.-]+:/{1,2})[^/\s@'\"]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 4, 4, 4
        self.maxstring, self.maxother = 120, 120

    def repr_str(self, x: str, level: int) -> str:
        """The text without secrets, since a part of one could not be recognised later."""
        return super().repr_str(without_secrets(x), level)

    def repr_int(self, x: int, level: int) -> str:
        """The number, or about how many digits it has: Python refuses to print more than 4,300 digits."""
        digits = int(x.bit_length() * 0.30103)
        return repr(x) if digits < 40 else f"a whole number of about {digits} digits"


_short = _Short()


def short(value: Any) -> str:
    """The repr of a value, shortened if it is long, deeply nested or contains itself, so that its length is limited."""
    return _short.repr(value)


def first_line(error: BaseException) -> str:
    """The type of another library's error and the first line of its message, shortened if long; for a ValueError, whose
    message says what is wrong with a value, the line alone."""
    text = without_secrets(str(error))
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    if len(line) > _LONGEST_ERROR:
        line = f"{line[:_LONGEST_ERROR]}..."
    if line and type(error) is ValueError:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def printable(text: str) -> str:
    """Text as one line for a terminal: line ends, control characters and lone surrogates become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_secrets(text: str) -> str:
    """Text with *** in place of what may be a secret: the user and password of a URL, a token of the Hub, and the values of
    environment variables whose names end in TOKEN, SECRET, PASSWORD or KEY."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", _CREDENTIALS.sub(r"\1***@", text))


def sizes_text(counts: Mapping[str, int], *, moved: int = 0, least: int = 0) -> str:
    """How many images have each size, as text such as "2 sizes (width x height): 96 x 64: 30, ...".

    counts: number of images by the name of a size in the cache, height first, such as "64x96".
    moved: how many of the images were not cropped to their nearest ratio, because fewer than `least` images have it.
    """
    named = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{width} x {height}: {count:,}" for (height, width), count in map(_split, named))
    text = f"{len(counts)} size{'s' * (len(counts) != 1)} (width x height): {listed}"
    return (
        f"{text}; {moved:,} of them were cropped from ratios that fewer than {least:,} images have"
        if moved
        else text
    )


def _split(named: tuple[str, int]) -> tuple[list[str], int]:
    return named[0].split("x"), named[1]
