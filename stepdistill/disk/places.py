"""Checks of paths, and the half-written files that a killed process leaves, recognised by their names. No torch.

.NAME.PID.partial          a file that process PID is writing, to be renamed to NAME when it is complete
.NAME.safetensors.partial  a file that only one process at a time writes
.NAME.partial              a folder that is being filled; a file with such a name is not ours
"""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable
from pathlib import Path

_FILE = re.compile(r"\.(?P<name>.+)(\.\d+|(?<=\.safetensors))\.partial")
_FOLDER = re.compile(r"\.(?P<name>.+)\.partial")
_MAX_WRITING_SECONDS = 10.0  # more than it takes to write the few kilobytes of one of these files


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False also if the path is too long or may not be read."""
    try:
        return path.is_dir()
    except OSError:
        return False


def half_written(path: Path) -> str | None:
    """The final name of a half-written file or folder; None if the path is not a half-written one."""
    match = (_FOLDER if is_folder(path) else _FILE).fullmatch(path.name)
    return match["name"] if match else None


def clear_half_written(
    folder: Path, *, names: Iterable[str] | None = None, is_alone: bool = False, spared: Collection[Path] = ()
) -> None:
    """Removes the half-written files and folders of stopped processes; those that cannot be removed stay.

    Args:
        folder: the folder to clear; without `names` also all folders below it.
        names: final names of the files to remove. Other processes may be writing one of them, so those that were written
            within the last seconds stay. Without names everything half-written is removed: no other process may be writing.
        is_alone: no other process is writing these files, so those of the last seconds are removed as well.
        spared: half-written folders that stay, with all that is in them.
    """
    chosen = None if names is None else frozenset(names)
    for path in list(folder.rglob(".*.partial") if chosen is None else folder.glob(".*.partial")):
        name = half_written(path)
        if any(path.is_relative_to(each) for each in spared):
            continue
        if name is None or (chosen is not None and (name not in chosen or (not is_alone and _is_new(path)))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_new(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) < _MAX_WRITING_SECONDS
    except OSError:
        return False


def check_writable(folder: Path) -> None:
    """OSError if no file can be made in a folder, or, if it does not exist yet, in the nearest folder above it. It tries by
    making and removing a folder there, because permissions alone say too little about file systems such as /proc."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(prefix=".stepdistill-", dir=place):
        pass
