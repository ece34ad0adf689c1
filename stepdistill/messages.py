"""Makes values, file names and errors of other libraries fit into a one-line message, whatever they contain. No torch."""

import reprlib
from collections.abc import Mapping
from typing import Any

_LONGEST_ERROR = 300


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 4, 4, 4
        self.maxstring, self.maxother = 120, 120

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
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    if len(line) > _LONGEST_ERROR:
        line = f"{line[:_LONGEST_ERROR]}..."
    if line and type(error) is ValueError:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def printable(text: str) -> str:
    """Text as one line for a terminal: line ends, control characters and lone surrogates become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sizes_text(counts: Mapping[str, int], *, moved: int = 0, least: int = 0) -> str:
    """How many pictures have each size, as text such as "2 sizes (width x height): 96 x 64: 30, ...".

    counts: number of pictures by the name of a size in the cache, height first, such as "64x96".
    moved: how many of the pictures were not cropped to their nearest ratio, because fewer than `least` pictures have it.
    """
    named = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{width} x {height}: {count:,}" for (height, width), count in map(_split, named))
    text = f"{len(counts)} size{'s' * (len(counts) != 1)} (width x height): {listed}"
    return (
        f"{text}; {moved:,} of them were cropped from ratios that fewer than {least:,} pictures have"
        if moved
        else text
    )


def _split(named: tuple[str, int]) -> tuple[list[str], int]:
    return named[0].split("x"), named[1]
