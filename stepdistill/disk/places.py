"""What lies at a path, and what a process that was killed left there: half-written files, told by their names. No torch.

.NAME.PID.partial          a file that process PID is writing beside its place, and renames when it is whole
.NAME.safetensors.partial  one that a single process at a time writes
.NAME.partial              a folder that is being filled; a file of that name is somebody else's
"""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

_FILE = re.compile(r"\.(?P<name>.+)(\.\d+|(?<=\.safetensors))\.partial")
_FOLDER = re.compile(r"\.(?P<name>.+)\.partial")
_WRITING_TAKES = 10.0  # seconds, of the few kilobytes that several processes of a run may write at once


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False too where the path is too long or may not be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def half_written(path: Path) -> str | None:
    """The name that a file or folder was to get; None for what is not half-written."""
    match = (_FOLDER if is_folder(path) else _FILE).fullmatch(path.name)
    return match["name"] if match else None


def clear_half_written(folder: Path, *, names: Iterable[str] | None = None) -> None:
    """Removes what stopped processes left half-written; what cannot be removed stays.

    Args:
        folder: with `names` itself alone, else with all folders in it.
        names: the files that this is about, of which other processes may be writing one right now: those written within
            the last seconds stay. Without names everything half-written goes: nobody else may be writing there.
    """
    chosen = None if names is None else frozenset(names)
    for path in list(folder.rglob(".*.partial") if chosen is None else folder.glob(".*.partial")):
        name = half_written(path)
        if name is None or (chosen is not None and (name not in chosen or _is_new(path))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_new(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _WRITING_TAKES
    except OSError:
        return False


def check_writable(folder: Path) -> None:
    """OSError where no file can be made in a folder that is there, or that would have to be made: one is made and removed
    at once, since rights alone tell too little of file systems such as /proc."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with tempfile.TemporaryDirectory(prefix=".stepdistill-", dir=place):
        pass
