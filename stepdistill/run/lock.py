"""The lock of a run's folder: one command works in it at a time. No torch.

run.lock is one line of JSON (host, boot, pid, start of the process, since when, command), held and described in two ways:

- The kernel's lock (flock) on the file, which ends with the process, however it ends. On one machine it alone decides, also
  between containers. Many network file systems pass it on to other machines, but not all do.
- The file itself, made with O_EXCL, of which any file system makes only one. Its text says whose it is, so that another
  machine refuses it even where flock does not reach: it cannot see whether that process still runs.

A process that ends by os._exit calls `release_all` before. A process that was killed leaves its file behind. The next
command takes over a file whose text names this machine (by its boot id, or by its host name before its last boot), if the
process has ended:

- With flock: it has ended if flock is free.
- Without flock: it has ended if no process with this number and start time runs.

A copied folder has a copy of the file, which nobody holds. A full disk makes the file empty; flock then decides alone.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stepdistill.disk.durable import writing
from stepdistill.disk.guarded_folder import guarded_folder, make_folder
from stepdistill.errors import FolderInUseError
from stepdistill.messages import printable, short

logger = logging.getLogger(__name__)
LOCK = "run.lock"
"""File at the top of a run's folder while a command works in it."""
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables of launchers, as accelerate reads them: the number of this process, and how many there are."""
_PATIENCE = 1.0
"""Seconds to wait for a process that is just ending, or that has made the file and not written its text yet."""
_PAUSE = 0.02
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST = 4096
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 19
"""Field of /proc/PID/stat after the command's name: the process's start, in clock ticks since the machine's start."""
_held: dict[Path, tuple[int, int]] = {}
"""The open file of each lock and the id of the process that took it, by the absolute path of the locked folder. A forked
process has a copy of this and holds no lock."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock belongs to. boot and start are None where the system has no /proc."""

    host: str
    boot: str | None
    pid: int
    start: int | None
    since: str
    command: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            start=_start_of(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=short(" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])),
        )

    @classmethod
    def of_text(cls, text: bytes) -> "Holder | None":
        """The holder that a lock's text describes; None if the text is empty or damaged."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (holder.host, holder.since, holder.command)
        return holder if all(isinstance(t, str) for t in texts) and type(holder.pid) is int else None

    def __str__(self) -> str:
        return printable(f"process {self.pid} on {self.host}, since {self.since} ({self.command})")

    @property
    def is_of_this_machine(self) -> bool:
        """Whether the process ran on this machine: since its last start, or before it under the same host name."""
        return self.host == socket.gethostname() or (self.boot is not None and self.boot == _boot())

    @property
    def is_running(self) -> bool:
        """Whether the process is seen on this machine."""
        if self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return self.start == _start_of(self.pid)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Inside it, no other command works in the run's folder, which is made if it is missing and guarded against removal.

    The processes of one launch (torchrun, accelerate launch) are one command: only the first of them takes the lock. Within
    a process that has the lock, `locked` may be entered again. FolderInUseError if another command works there; ValueError
    in one line if the lock cannot be written.
    """
    place, path = run_dir.absolute(), run_dir / LOCK
    if place in _held:
        yield
        return
    with writing(path):
        make_folder(run_dir)
    with guarded_folder(run_dir):
        if not _is_main():
            yield
            return
        with writing(path):
            descriptor = _taken(path)
        _held[place] = (descriptor, os.getpid())
        try:
            yield
        finally:
            _held.pop(place, None)
            _remove(place / LOCK, descriptor)
            os.close(descriptor)


def release_all() -> None:
    """Removes the locks of this process. Called before os._exit, which skips the end of `locked`: the file would stay, and
    another machine, where flock may not reach, would refuse the folder."""
    for place, (descriptor, process) in list(_held.items()):
        if process == os.getpid():
            _remove(place / LOCK, descriptor)


def is_alone_in(run_dir: Path) -> bool:
    """Whether no other process writes into a run's folder: this one has its lock, and is the only one of its launch."""
    return run_dir.absolute() in _held and is_alone()


def is_alone() -> bool:
    """Whether this process is the only one of its launch, or has no launcher."""
    return _first_set(_SIZES, default="1") == "1"


def _is_main() -> bool:
    return is_alone() or _first_set(_RANKS, default="0") == "0"


def _first_set(names: tuple[str, ...], *, default: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), default)


def _taken(path: Path) -> int:
    """Takes the lock and returns its open file; FolderInUseError if it is another's."""
    until = time.monotonic() + _PATIENCE
    while True:
        descriptor, is_new = _opened(path)
        is_last = time.monotonic() >= until
        try:
            refusal = _refusal(path, descriptor, is_new=is_new, is_last=is_last)
            if refusal is None:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if refusal and is_last:
            raise FolderInUseError(refusal)
        time.sleep(_PAUSE)


def _opened(path: Path) -> tuple[int, bool]:
    """The lock's open file, and whether this process has made it."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
        with suppress(FileNotFoundError):  # released between the two lines
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), False


def _refusal(path: Path, descriptor: int, *, is_new: bool, is_last: bool) -> str | None:
    """Takes the lock if nobody has it, and returns None; else why not, "" if the file was removed in the meantime.

    is_last: nobody will look again, so an empty file counts as left behind if flock is free.
    """
    is_free = _flock(descriptor)
    if not _is_at(path, descriptor):
        return ""
    text = os.pread(descriptor, _LARGEST, 0)
    holder = Holder.of_text(text)
    if is_free is False:
        return _in_use(path, holder)
    if holder is not None:
        if not holder.is_of_this_machine:
            return _unknown(path, holder)
        if is_free is None and holder.is_running:
            return _in_use(path, holder)
        logger.info("%s is left behind by %s, which has ended: taken over", path, holder)
    elif not is_new and (is_free is None or not is_last):
        return _unknown(path, None)
    return _claim(path, descriptor, check_again=is_free is None and not is_new)


def _claim(path: Path, descriptor: int, *, check_again: bool) -> str | None:
    """Writes this process into the lock. check_again: without flock, another process may be writing at the same time."""
    text = json.dumps(asdict(Holder.here()), allow_nan=False).encode() + b"\n"
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        os.ftruncate(descriptor, 0)
        return None
    if check_again:
        time.sleep(5 * _PAUSE)
        if os.pread(descriptor, _LARGEST, 0) != text:
            return _in_use(path, Holder.of_text(os.pread(descriptor, _LARGEST, 0)))
    return None


def _remove(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_at(path, descriptor):
            path.unlink()


def _flock(descriptor: int) -> bool | None:
    """Takes the kernel's lock; False if another process has it, None if the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _in_use(path: Path, holder: Holder | None) -> str:
    who = f"by {holder}" if holder is not None else "by another process"
    return (
        f"{path.parent} is in use {who}; allowed: one command at a time; fix: wait until it ends, stop it, or use another "
        f"name=..."
    )


def _unknown(path: Path, holder: Holder | None) -> str:
    who = f"by {holder}, which cannot be checked from here" if holder is not None else "by an unknown process"
    return f"{path.parent} is in use {who}; fix: wait until it ends; if it is certainly gone, remove {path}"


def _boot() -> str | None:
    """An id of the machine's last start."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return None


def _start_of(pid: int) -> int | None:
    try:
        about = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(about.rpartition(")")[2].split()[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return None
