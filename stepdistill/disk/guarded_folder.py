"""A folder that must stay where it is while a command writes into it, such as a run's. No torch.

Many writers make the folders that are missing. If somebody removes a run's folder under a command, such a writer would make
it again, with nothing but its last files in it. Inside `guarded_folder`, writing ends with a one-line error instead.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_guarded: dict[Path, tuple[int, int]] = {}
"""Device and inode of each guarded folder, by its absolute path."""


@contextmanager
def guarded_folder(folder: Path) -> Iterator[None]:
    """Guards an existing folder. An error that follows from its removal becomes the ValueError of `check_present`."""
    place = folder.absolute()
    if place in _guarded:
        yield
        return
    about = place.stat()
    _guarded[place] = (about.st_dev, about.st_ino)
    try:
        yield
    except (OSError, ValueError):
        check_present(place)
        raise
    finally:
        del _guarded[place]


def check_present(path: Path) -> None:
    """ValueError if the path is in a guarded folder, or is one, that was removed, renamed or replaced by another."""
    root = _root_of(path)
    if root is None:
        return
    try:
        about = root.stat()
        is_there = (about.st_dev, about.st_ino) == _guarded[root]
    except OSError:
        is_there = False
    if not is_there:
        raise ValueError(
            f"{root} was removed or renamed while this command worked in it; fix: put it back, and the same command "
            f"continues; without it, the same command starts from the beginning"
        )


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are missing. ValueError instead of making a guarded folder again."""
    root = _root_of(folder)
    if root is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    check_present(folder)
    place = folder.absolute()
    above = [parent for parent in place.parents if parent.is_relative_to(root)]
    for each in [*reversed(above), place]:
        if each == root:
            continue
        try:
            each.mkdir(exist_ok=True)
        except FileNotFoundError:
            check_present(folder)
            raise


def _root_of(path: Path) -> Path | None:
    """The innermost guarded folder that holds the path, or is the path."""
    place = Path(os.path.abspath(path))
    return next((each for each in (place, *place.parents) if each in _guarded), None)
