"""Stopping a training between two updates: on SIGTERM, on SIGINT (Ctrl-C), or once a time budget is used. No torch.

The first signal lets the update in progress finish, and its state is saved. A second one ends the process at once. But under
torchrun a second SIGTERM does nothing: a cluster sends it to all processes, and then torchrun passes its own on.
"""

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from stepdistill.errors import INTERRUPTED, TO_BE_CONTINUED
from stepdistill.run.lock import release_all

logger = logging.getLogger(__name__)
_EXIT_CODES = {signal.SIGTERM: TO_BE_CONTINUED, signal.SIGINT: INTERRUPTED}


class StopRequest:
    """Context manager that notices requests to stop. Signals are noticed in the main thread only.

    max_minutes: time after which training is to stop; None: no limit.
    began: time.monotonic() from which that time counts, the command's start; None: now.
    """

    def __init__(self, *, max_minutes: float | None, began: float | None = None) -> None:
        start = time.monotonic() if began is None else began
        self._until = None if max_minutes is None else start + 60 * max_minutes
        self._signal: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._notice) for number in _EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The exit code to stop with; 0 if training is to go on."""
        if self._signal is not None:
            return _EXIT_CODES[signal.Signals(self._signal)]
        return TO_BE_CONTINUED if self._is_time_used else 0

    @property
    def reason(self) -> str:
        """Why training is to stop, for the message."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return "training.max_minutes is used" if self._is_time_used else "another process of the launch stops"

    @property
    def _is_time_used(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def _notice(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
                return
            release_all()
            os._exit(_EXIT_CODES[signal.Signals(number)])
        self._signal = number
        logger.info("%s: stops after this update; a second signal stops at once", signal.Signals(number).name)
