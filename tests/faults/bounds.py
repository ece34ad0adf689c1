"""Bounds for hostile files: the seconds, the memory and the one line of output that a command may take."""

import contextlib
import faulthandler
import signal
import sys
from pathlib import Path

from stepdistill.cli import app, guarded

SECONDS = 20
BYTES = 2**29
_PEAK = Path("/proc/self/clear_refs")


class TooSlow(BaseException):
    """Not an Exception, so that code that catches a library's exceptions does not catch this one."""


@contextlib.contextmanager
def bounded(seconds=SECONDS, most_bytes=BYTES):
    """Fails if its body takes more than `seconds`, or needs more than `most_bytes` of additional memory."""

    def stop(_number, _frame):
        raise TooSlow(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    # for code that no signal interrupts
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    with contextlib.suppress(OSError):
        _PEAK.write_text("5")  # resets the peak of the resident memory
    resident_before = _resident("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    growth = _resident("VmHWM") - resident_before
    assert growth < most_bytes, f"it takes {growth / 2**20:.0f} MiB"


def command(capsys, *words):
    """Runs the command line in this process within bounds: (exit code, standard output, standard error)."""
    capsys.readouterr()
    with bounded():
        code = guarded(lambda: app(list(map(str, words))))
    return code, *capsys.readouterr()


def one_line(error):
    """The one line that a refused command writes on standard error; AssertionError if there is not exactly one line."""
    lines = [line for line in error.splitlines() if line.startswith("stepdistill: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def problems(out):
    """The problems that `doctor` prints on standard output, each joined with its remedy into one line."""
    lines = out.replace("\n         fix: ", "; allowed: ").splitlines()
    return [line for line in lines if line.startswith("problem ")]


def _resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
