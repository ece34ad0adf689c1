"""What a hostile file may cost: seconds and memory, and one line."""

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
    """No Exception, so that nobody who expects those of a library takes it for one."""


@contextlib.contextmanager
def bounded(seconds=SECONDS, most_bytes=BYTES):
    """Fails where its body takes longer, or more memory than there was before."""

    def late(_number, _frame):
        raise TooSlow(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(
        4 * seconds, exit=True, file=sys.__stderr__
    )  # of code that no signal interrupts
    with contextlib.suppress(OSError):
        _PEAK.write_text("5")  # the peak begins anew
    held = _resident("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    grown = _resident("VmHWM") - held
    assert grown < most_bytes, f"it takes {grown / 2**20:.0f} MiB"


def command(capsys, *words):
    """(exit code, standard output, standard error) of the command line within bounds, in this process."""
    capsys.readouterr()
    with bounded():
        code = guarded(lambda: app(list(map(str, words))))
    return code, *capsys.readouterr()


def one_line(error):
    """The line that a refused command says on standard error; AssertionError where it is another number of lines."""
    lines = [line for line in error.splitlines() if line.startswith("stepdistill: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def problems(out):
    """What `doctor` calls a problem on standard output, each with its remedy in one line."""
    lines = out.replace("\n         mend: ", "; allowed: ").splitlines()
    return [line for line in lines if line.startswith("problem ")]


def _resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
