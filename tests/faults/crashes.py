"""Forked processes that die, tear a write or meet a full disk at their n-th file operation."""

import builtins
import contextlib
import errno
import io
import json
import logging
import os
import shutil

CRASHED = 9
_WRITERS = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "fsync", "ftruncate", "pwrite")
_NEEDS_ROOM = ("open", "write", "mkdir", "fsync", "pwrite", "rename", "replace")


class Operations:
    """Counts file operations, and at number `at` does what `how` says: "die" before it, "torn" after half of a write, "late"
    after it, "full" with ENOSPC. With at=None it only records their names."""

    def __init__(self, at=None, how="die"):
        self.at, self.how, self.names = at, how, []

    def meet(self, name, half=lambda: None):
        number = len(self.names)
        self.names.append(name)
        if number != self.at or self.how == "late":
            return
        if self.how in ("torn", "full"):
            half()
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os._exit(CRASHED)

    def after(self):
        """Call it after each operation."""
        if self.how == "late" and len(self.names) - 1 == self.at:
            os._exit(CRASHED)

    def install(self):
        """Puts itself before the operations of this process, for good."""
        for name in _WRITERS:
            setattr(os, name, self._before(name, getattr(os, name)))
        operations, plain_open = self, io.open

        class File(io.FileIO):
            def write(self, content):
                operations.meet("write", lambda: io.FileIO.write(self, bytes(content)[: len(content) // 2]))
                written = super().write(content)
                operations.after()
                return written

        def opened(path, mode="r", buffering=-1, encoding=None, *args, **options):
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return plain_open(path, mode, buffering, encoding, *args, **options)
            operations.meet("open")
            raw = File(path, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            file = io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8")

        io.open = builtins.open = opened

    def _before(self, name, plain):
        def operation(*args, **options):
            half = (
                (lambda: plain(args[0], args[1][: len(args[1]) // 2], *args[2:]))
                if name == "pwrite"
                else None
            )
            self.meet(name, half or (lambda: None))
            done = plain(*args, **options)
            self.after()
            return done

        return operation


def crash_points(act):
    """(number, how) of each way in which `act` can be interrupted, by the operations that it makes in a forked process."""
    read, write = os.pipe()

    def recorded():
        operations = Operations()
        operations.install()
        act()
        os.write(write, json.dumps(operations.names).encode())
        return 0

    assert in_fork(recorded) == 0
    os.close(write)
    with os.fdopen(read) as pipe:
        names = json.load(pipe)
    for number, name in enumerate(names):
        yield number, "die"
        if name in ("write", "pwrite"):
            yield number, "torn"
        if name in _NEEDS_ROOM:
            yield number, "full"
    yield len(names) - 1, "late"


def interrupted(act, number, how):
    """Runs `act` in a forked process that is interrupted at this operation; returns its exit code, 1 after an error."""

    def body():
        Operations(number, how).install()
        act()
        return 0

    return in_fork(body)


def in_fork(body):
    """The exit code of a forked process that runs `body`; its messages are dropped."""
    child = os.fork()
    if child == 0:
        code = 1
        logging.disable()
        with contextlib.suppress(BaseException):
            code = body()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(template, place):
    """Makes `place` a copy of the folder `template`."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place)


def hidden(folder):
    """All hidden files and folders below a folder."""
    return [path.name for path in folder.rglob(".*")]
