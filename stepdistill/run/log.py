"""The log of a run: every update in a JSONL file; on a terminal a progress bar with ETA, elsewhere plain lines."""

import json
import os
import sys
import time
from io import FileIO
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepdistill.disk.durable import finite_or_null, warn_of_damage, write_text, writing
from stepdistill.disk.guarded_folder import check_present

_PLACE = ("rung", "phase", "step")
"""Keys that say to which update a line belongs."""
_MAX_NAMED = 8


class TrainingLog:
    """Appends to a run's log.jsonl. Call `begin` before the first `write`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None

    def begin(self, rung: int, *, phase: int, step: int) -> None:
        """Removes the lines of updates that are about to be made again: those of the rung with that many student_steps, from
        this phase and step on. All other lines stay, whenever the process is killed."""
        self.close()
        earlier = [
            line
            for line in read_log(self._path)
            if line["rung"] != rung or (line["phase"], line["step"]) < (phase, step)
        ]
        write_text(
            self._path, "".join(json.dumps(finite_or_null(line), allow_nan=False) + "\n" for line in earlier)
        )
        with writing(self._path):
            self._file = self._path.open("ab", buffering=0)

    def write(self, record: dict) -> None:
        """Writes a record as one line of JSON, without buffering; ValueError if it cannot be written."""
        assert self._file is not None, "begin comes first"
        rest = (json.dumps(finite_or_null(record), allow_nan=False) + "\n").encode()
        with writing(self._path):
            check_present(self._path)
            while rest:
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Makes the lines durable."""
        assert self._file is not None, "begin comes first"
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl: JSON objects with integers under rung, phase and step.

    A last line that a crash cut short is left out. Other damaged lines are left out with a warning that counts them and
    names the first ones by their numbers, from 1.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; fix: allow this user to read it") from None
    *whole, cut_short = map(_record, lines)
    records = [record for record in whole if record is not None]
    damaged = [number for number, record in enumerate(whole, start=1) if record is None]
    if damaged:
        first = ", ".join(map(str, damaged[:_MAX_NAMED])) + (", ..." if len(damaged) > _MAX_NAMED else "")
        warn_of_damage(path, f"{len(damaged)} of its {len(whole)} lines are left out (line {first})")
    return records if cut_short is None else [*records, cut_short]


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and all(type(record.get(key)) is int for key in _PLACE)
    return record if is_record else None


class PhaseProgress:
    """Progress of one phase on the console: a bar on a terminal, else a line every `logging_steps` updates."""

    def __init__(self, title: str, total: int, *, logging_steps: int, enabled: bool) -> None:
        self._title, self._total, self._every = title, total, logging_steps
        self._enabled = enabled
        self._console = Console(file=sys.stdout, highlight=False)
        self._started, self._shown = time.monotonic(), 0
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, numbers="")

    def __enter__(self) -> "PhaseProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, numbers: dict[str, float]) -> None:
        """Shows the progress after update number `done`, counted from 1."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=text)
        elif self._enabled and (done // self._every > self._shown or done == self._total):
            self._shown = done // self._every
            elapsed = time.monotonic() - self._started
            remaining = elapsed / done * (self._total - done)
            self._console.print(
                f"{self._title}  {done}/{self._total}  {text}  {elapsed:.0f} s, {remaining:.0f} s to go",
                soft_wrap=True,
            )
