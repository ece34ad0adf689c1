"""The version of a picture's file, which changes when another picture takes its name: its length, and bytes of its middle.

One short read is enough. A picture that was drawn or encoded anew differs there, whatever its date says; a copied data set
keeps its versions.
"""

import stat
from pathlib import Path

_BYTES = 64


def version_of_file(path: Path) -> str:
    """Of a regular file; other kinds have no version and are never opened."""
    try:
        status = path.stat()
    except (OSError, UnicodeError):
        return "missing"
    return version_of_part(path, 0, status.st_size) if stat.S_ISREG(status.st_mode) else "no file"


def version_of_part(path: Path, offset: int, size: int) -> str:
    """Of `size` bytes of a file from `offset` on: a member of an archive."""
    try:
        with path.open("rb") as file:
            file.seek(offset + size // 2)
            return f"{size}:{file.read(min(_BYTES, size - size // 2)).hex()}"
    except OSError:
        return "missing"


def version_of_bytes(content: bytes) -> str:
    """Of what is in memory."""
    middle = len(content) // 2
    return f"{len(content)}:{content[middle : middle + _BYTES].hex()}"
