"""Values, file names and other libraries' errors as part of one line to the user, whatever they hold. No torch."""

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
        """Python refuses to print whole numbers of more than 4,300 digits."""
        digits = int(x.bit_length() * 0.30103)
        return repr(x) if digits < 40 else f"a whole number of about {digits} digits"


_short = _Short()


def short(value: Any) -> str:
    """A value as its repr, cut where it is long, deep or nested in itself; its size in the message has a limit."""
    return _short.repr(value)


def first_line(error: BaseException) -> str:
    """The kind of another library's error and the first line that it says, cut where it is long; a ValueError's line alone,
    which says what is wrong with a value."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if len(said) > _LONGEST_ERROR:
        said = f"{said[:_LONGEST_ERROR]}..."
    if said and type(error) is ValueError:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def printable(text: str) -> str:
    """Text for a terminal in one line: line ends, control characters and half characters as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sizes_text(counts: Mapping[str, int], *, moved: int = 0, least: int = 0) -> str:
    """How pictures fall into sizes, by their names in the cache, height first: "2 sizes (width x height): 96 x 64: 30, ...".

    moved: how many of them were cut to another ratio than the nearest to their own, because fewer than `least` had that.
    """
    named = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{width} x {height}: {count:,}" for (height, width), count in map(_split, named))
    text = f"{len(counts)} size{'s' * (len(counts) != 1)} (width x height): {listed}"
    return (
        f"{text}; {moved:,} of them were of ratios that fewer than {least:,} pictures have" if moved else text
    )


def _split(named: tuple[str, int]) -> tuple[list[str], int]:
    return named[0].split("x"), named[1]
