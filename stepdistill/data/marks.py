"""What tells a picture from another that took its name, at the price of one short read: length, and bytes of the middle.

A picture drawn or encoded anew differs there, whatever its date says; a copied data set stays the same.
"""

import stat
from pathlib import Path

_BYTES = 64


def mark_of_file(path: Path) -> str:
    """Of a regular file; others have no mark and are never opened."""
    try:
        status = path.stat()
    except (OSError, UnicodeError):
        return "missing"
    return mark_of_part(path, 0, status.st_size) if stat.S_ISREG(status.st_mode) else "no file"


def mark_of_part(path: Path, offset: int, size: int) -> str:
    """Of `size` bytes of a file from `offset` on: a member of an archive."""
    try:
        with path.open("rb") as file:
            file.seek(offset + size // 2)
            return f"{size}:{file.read(min(_BYTES, size - size // 2)).hex()}"
    except OSError:
        return "missing"


def mark_of_bytes(content: bytes) -> str:
    """Of what is in memory."""
    middle = len(content) // 2
    return f"{len(content)}:{content[middle : middle + _BYTES].hex()}"
