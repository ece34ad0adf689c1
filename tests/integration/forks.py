"""Commands in forks of a process that has imported everything already, in place of new processes.

A new process spends about ten seconds of processor time on importing torch, diffusers, transformers and peft, and a launch
of two has two of them and its launcher. A fork has its own process id, environment, signal handlers and exit code as a new
process has; the launchers are torchrun and accelerate themselves, and their processes are forks of them.
"""

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.integration.imported"])
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Fork:
    """`python WORDS...` in a fork; its methods are those of subprocess.Popen with text and a pipe for standard error."""

    def __init__(self, words, environment):
        self._folder = tempfile.TemporaryDirectory(prefix="fork")
        self._errors = Path(self._folder.name) / "stderr"
        self._errors.touch()
        self.stderr = self._errors.open(encoding="utf-8", errors="replace")
        arguments = ([*map(str, words)], environment, os.getcwd(), str(self._errors))
        self._process = _FORKS.Process(target=_started, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def kill(self):
        self._process.kill()
        self._process.join()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        self._process.join(timeout)
        if deadline is not None and self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """(None, standard error), when the process has ended."""
        self.wait(timeout)
        return None, self._errors.read_text(encoding="utf-8", errors="replace")


def _started(words, environment, folder, errors):
    """The fork's main function."""
    import torch
    from torch.distributed import run

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    before = run.config_from_args

    def forking(options):
        config, _python, words = before(options)
        config.start_method = "fork"
        return config, _as_new_process, words

    run.config_from_args = forking
    _as_new_process(*words)


def _as_new_process(*words):
    """Runs `python WORDS...`, and ends as that does."""
    ctypes.CDLL(None).prctl(
        _SET_DEATH_SIGNAL, 0
    )  # multiprocessing lets a process end with the one that started it
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [word for word in words if word != "-u"]
    try:
        _run(words)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _run(words):
    if words[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed import run  # not as __main__, whose config_from_args would be another one

        run.main(words[2:])
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
