"""The processes of a launch (torchrun, accelerate launch, srun) meet, end together, and print the reason once. Imports torch
late.

torch.distributed keeps a key-value store in the launcher, or in process 0 if there is none. A process that fails leaves a
note there. In each process a thread, the watch, looks for notes and for the launcher itself: a process that waits for the
others inside an operation of all processes, above all on a GPU, would notice neither.

When torchrun starts the processes again after a failure, it keeps the store with all that the ended ones wrote. A new
process that reads an ended one's address there waits for it for ever (github.com/pytorch/pytorch/issues/135712). So the
processes agree on a name for each start, and every key that they use for their first meeting begins with it.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from stepdistill.errors import INTERRUPTED, TO_BE_CONTINUED, DistributedError
from stepdistill.messages import first_line, printable

_LOOKS_EVERY = 1.0  # seconds between two looks of the watch
_MAIN_THREAD_HAS = 10.0  # seconds to end by itself, after another process has failed
_FIRST_PROCESS_HAS = 10.0  # seconds for process 0 to print an error that the others probably share
_STORE_MAY_BE_SILENT = 60.0  # seconds
_MEETS_EVERY = 0.05  # seconds between two looks for the other processes' words at the start
_LONGEST_CAUSE = 120
_ENDED = " of the launch ended: {}"
_FIX = "fix: see its messages, and start the same command again, which continues from the last checkpoint"
_LAUNCH = "fix: launch with torchrun, or set what docs/cluster.md sets; for one process, unset WORLD_SIZE"
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
_Answer = TypeVar("_Answer")


def check_environment() -> None:
    """ValueError unless the variables by which a launcher tells a process its place are complete and numbers."""
    values = {name: os.environ[name] for name in (*_NUMBERS, "MASTER_ADDR") if os.environ.get(name)}
    for name in _NUMBERS:
        if not values.get(name, "0").isdecimal():
            raise ValueError(
                f"{name}: got {printable(repr(values[name]))} in the environment; allowed: a number; {_LAUNCH}"
            )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in values]
    if int(values.get("WORLD_SIZE", "1")) > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {values['WORLD_SIZE']} in the environment, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {_LAUNCH}"
        )


class Launch:
    """What one process knows of the launch that it belongs to.

    Args:
        store: a connection to the store that nothing else uses.
        name: sets this start of the launch apart from earlier ones, whose notes may still be in the store.
        launcher: process id of torchrun or accelerate; None if there is none that waits for the processes.
        release: called before the watch ends this process, whose `finally` clauses then do not run.
    """

    def __init__(
        self, store: Any, *, name: str, launcher: int | None, release: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._launcher, self._release = store, launcher, release
        self._prefix, self._last_answer = f"stepdistill/{name}", time.monotonic()
        self._ends = threading.Lock()  # taken by the thread that ends this process, and never released
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch of the launch", daemon=True)

    def watch(self) -> None:
        """Starts the watch, which ends this process with code 8 if another one failed or the launcher is gone."""
        self._thread.start()
        atexit.register(self._end_watch)  # Python ends a thread that is inside torch with an abort

    def _end_watch(self) -> None:
        self._over.set()
        self._thread.join(timeout=_MAIN_THREAD_HAS)

    def tell(self, note: str) -> None:
        """Leaves a note of this process's failure, unless another process has left one before."""
        self._ends.acquire(blocking=False)
        if self._ask(lambda store: store.add(f"{self._prefix}/notes", 1)) == 1:
            self._ask(lambda store: store.set(f"{self._prefix}/note", note))

    def note(self) -> str | None:
        """The note of the process that failed first; None if none did."""
        key = f"{self._prefix}/note"
        if not self._ask(lambda store: store.check([key])):
            return None
        return (self._ask(lambda store: store.get(key)) or b"").decode(errors="replace") or None

    def is_first(self, message: str) -> bool:
        """Whether no other process has asked this about the same message."""
        return self._ask(lambda store: store.add(f"{self._prefix}/said {message}", 1)) in (None, 1)

    def _ask(self, question: Callable[[Any], _Answer]) -> _Answer | None:
        """The store's answer; None if it is gone, which is no failure in itself: process 0 may have finished its work."""
        try:
            answer = question(self._store)
        except RuntimeError:
            return None
        self._last_answer = time.monotonic()
        return answer

    def _watch(self) -> None:
        while not self._over.wait(_LOOKS_EVERY):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end(f"the launcher, process {self._launcher} of this machine, was killed; {_FIX}")
            note = self.note()
            if note is not None and not self._over.wait(_MAIN_THREAD_HAS):
                self._end(note if self.is_first(note) else None)
            if time.monotonic() - self._last_answer > _STORE_MAY_BE_SILENT:
                self._end(f"the launch's first process or its launcher is gone; {_FIX}")

    def _end(self, message: str | None) -> None:
        """Ends this process, unless its main thread does so already. message: None if another process has printed it."""
        if self._ends.acquire(blocking=False):
            if message is not None:
                print(f"stepdistill: {printable(message)}", file=sys.stderr, flush=True)
            self._release()
            os._exit(DistributedError.exit_code)


_launch: Launch | None = None


def name_start(timeout: timedelta) -> tuple[str, dict[str, Any]]:
    """The name of this start of the launch, and arguments of init_process_group: a store whose keys begin with that name.

    Both are empty if WORLD_SIZE is 1 or not set.

    timeout: how long the processes wait for one another; then DistributedError.
    """
    from torch.distributed import PrefixStore, rendezvous

    count = int(os.environ.get("WORLD_SIZE") or "1")
    if count == 1:
        return "", {}
    until = time.monotonic() + timeout.total_seconds()
    store, rank, _ = next(rendezvous("env://", _index(), count, timeout=timeout))
    name = agree(PrefixStore("stepdistill/start", store), rank, count, until=until)
    return name, {"store": PrefixStore(name, store), "rank": rank, "world_size": count}


def agree(store: Any, rank: int, count: int, *, until: float) -> str:
    """A name for this start of the launch: the same in all processes, and new even if the store has seen other starts.

    Every other process writes a random word. Process 0 answers it with a new name beside that word, and waits until the
    process has written the name back. A word, offer or answer of an earlier start does not fit, so it is ignored. The
    launcher must have ended all processes of earlier starts.

    rank: this process's number, from 0 to count - 1.
    until: time.monotonic() at which a process gives up: DistributedError.
    """
    mine = uuid.uuid4().hex

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def pause(number: int) -> None:
        if time.monotonic() > until:
            what = "did not answer within training.distributed_timeout"
            raise DistributedError(f"process {number} of the launch {what}, at the start; {_FIX}")
        time.sleep(_MEETS_EVERY)

    if rank > 0:
        store.set(f"word/{rank}", mine)
        while not (offer := read(f"offer/{rank}")).endswith(mine):
            pause(0)
        name = offer.removesuffix(mine)
        store.set(f"answer/{rank}", name)
        return name
    waiting = list(range(1, count))
    while waiting := [number for number in waiting if read(f"answer/{number}") != mine]:
        for number in waiting:
            store.set(f"offer/{number}", mine + read(f"word/{number}"))
        pause(waiting[0])
    return mine


def is_joined() -> bool:
    """Whether this process has joined its launch."""
    return _launch is not None


def join(name: str, *, release: Callable[[], None]) -> None:
    """Connects this process to the store, starts the watch, and lets `ending` tell the other processes. Called once in each
    process of a launch, when they have met.

    name: the same in all of them, and different in each start of the launch.
    release: called before the watch ends this process.
    """
    global _launch
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    _launch = Launch(store, name=name, launcher=launcher, release=release)
    _launch.watch()


def ending(message: str, code: int, *, is_agreed: bool = False) -> tuple[str | None, int]:
    """What this process prints and with which code it exits, when it ends by an error with this message and exit code.

    None in place of the message if another process prints it. If another process failed first, the code is 8 and the message
    is that process's note.

    is_agreed: whether all processes stop now, as training lets them. Otherwise they are told that this one ends, also if a
    signal stopped it: it may be the only one that got the signal.
    """
    if _launch is None:
        if _index() > 0:
            # all read the same config, so process 0 probably prints this message now and ends the launch
            time.sleep(_FIRST_PROCESS_HAS)
        return message, code
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's: this process ends by itself
    is_stop = code in (TO_BE_CONTINUED, INTERRUPTED)
    note = _launch.note()
    got_same_signal = is_stop and note is not None and note.endswith(_ENDED.format(message))
    if note is not None and (is_stop or code == DistributedError.exit_code) and not got_same_signal:
        message, code, is_stop, is_agreed = note, DistributedError.exit_code, False, False
    if not is_agreed:
        _launch.tell(message if code == DistributedError.exit_code else _note(message))
    return message if _launch.is_first(str(code) if is_stop else message) else None, code


def tell(error: BaseException) -> None:
    """Tells the other processes that this one ends by an error, which Python prints with its traceback."""
    if _launch is not None:
        _launch.tell(_note(first_line(error)))


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Turns an error of an operation of all processes into a DistributedError: another process ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_another_process(error) and type(error) is not RuntimeError:
            raise  # such as out of memory
        # without gloo's source file and advice
        cause = first_line(error).split("] ", 1)[-1].split(". ")[0][:_LONGEST_CAUSE]
        what = "did not answer within training.distributed_timeout" if "imed out" in cause else "ended"
        raise DistributedError(f"another process of the launch {what} ({cause}); {_FIX}") from error


def is_of_another_process(error: BaseException) -> bool:
    """Whether torch.distributed raised an error. NCCL's come later than the operation that failed."""
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__)


def _note(message: str) -> str:
    return f"process {_index()}{_ENDED.format(message)}"


def _index() -> int:
    """The number of this process in its launch, from 0, before the processes have met."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0
