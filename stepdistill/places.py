"""What lies at a path, and what a process that was killed left there: half-written files under names of their own. No torch.

.NAME.partial and .NAME.PID.partial   a file or folder that is being written beside its place, and renamed when it is whole
"""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<name>.+?)(\.\d+)?\.partial")
_WRITING_TAKES = 10.0  # seconds, of the few kilobytes that several processes of a run may write at once


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False too where the path is too long or may not be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_half_written(path: Path) -> bool:
    """Whether a path has the name of something that was being written."""
    return _PARTIAL.fullmatch(path.name) is not None


def clear_half_written(folder: Path, *, names: Iterable[str] | None = None) -> None:
    """Removes what stopped processes left half-written; what cannot be removed stays.

    Args:
        folder: with `names` itself alone, else with all folders in it.
        names: the files that this is about, of which other processes may be writing one right now: those written within
            the last seconds stay. Without names everything half-written goes: nobody else may be writing there.
    """
    chosen = None if names is None else frozenset(names)
    for path in list(folder.rglob(".*.partial") if chosen is None else folder.glob(".*.partial")):
        found = _PARTIAL.fullmatch(path.name)
        if found is None or (chosen is not None and (found["name"] not in chosen or _is_new(path))):
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
