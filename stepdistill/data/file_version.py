"""The version of an image file, which changes if another image takes its name: its length, and 64 bytes from its middle.

One short read is enough: an image that was drawn or encoded again differs in its middle. The file's date plays no part, so
a copied data set has the same versions.
"""

import stat
from pathlib import Path

_BYTES = 64


def version_of_file(path: Path) -> str:
    """The version of a regular file; "missing", or "no file" for anything else, which is never opened."""
    try:
        status = path.stat()
    except (OSError, UnicodeError):
        return "missing"
    return version_of_part(path, 0, status.st_size) if stat.S_ISREG(status.st_mode) else "no file"


def version_of_part(path: Path, offset: int, size: int) -> str:
    """The version of an archive member: `size` bytes of a file, beginning at `offset`."""
    try:
        with path.open("rb") as file:
            file.seek(offset + size // 2)
            return f"{size}:{file.read(min(_BYTES, size - size // 2)).hex()}"
    except OSError:
        return "missing"


def version_of_bytes(content: bytes) -> str:
    """The version of an image in memory."""
    middle = len(content) // 2
    return f"{len(content)}:{content[middle : middle + _BYTES].hex()}"
