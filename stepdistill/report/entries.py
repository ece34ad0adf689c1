"""The table rows of one or several runs as one list, each with its label in tables, plots and images.

With several runs, a row of the undistilled teacher appears once if all runs have the same numbers for it, and students with
equal steps stand next to each other, so that runs are compared rung by rung.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.report.number_format import Number, number
from stepdistill.report.read import Run

FEW_STEPS = 8
_SAME = 1e-6


@dataclass(frozen=True)
class Entry:
    """A row of a run's table, with its label in the report."""

    label: str
    run: Run
    row: dict[str, Any]

    @property
    def name(self) -> str:
        """The row's name within its run."""
        return self.row["row"]

    @property
    def kind(self) -> str:
        """teacher, student or lora."""
        return self.row["kind"]

    @property
    def steps(self) -> int:
        """num_inference_steps."""
        return self.row["steps"]

    @property
    def is_reference(self) -> bool:
        """Whether `*_to_teacher` is measured against this row."""
        return self.name == self.run.reference

    @property
    def is_unguided(self) -> bool:
        """Whether this row is the undistilled teacher without guidance."""
        return self.name.startswith("unguided-")

    def value(self, key: str) -> Number | None:
        """One of the row's numbers, None if it was not measured."""
        return number(self.row.get(key))


def entries_of(runs: Sequence[Run]) -> list[Entry]:
    """All rows of the runs; the file's docstring describes their order and labels."""
    if len(runs) == 1:
        return [Entry(row["row"], runs[0], row) for row in runs[0].rows]
    every = [Entry(f"{run.name}: {row['row']}", run, row) for run in runs for row in run.rows]
    teachers: list[Entry] = []
    for entry in (e for e in every if e.kind == "teacher"):
        others = [e for e in every if e.name == entry.name and e.run is not entry.run]
        if all(_same(entry, other) for other in others):
            if all(t.name != entry.name for t in teachers):
                teachers.append(Entry(entry.name, entry.run, entry.row))
        else:
            teachers.append(entry)
    rest = [entry for entry in every if entry.kind != "teacher"]
    return teachers + sorted(rest, key=lambda e: (-e.steps, e.kind == "lora"))


def equal_passes(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The undistilled guided teacher's row with as many network passes as this row, else with as many steps; None if neither
    exists."""
    teachers = [e for e in entries if e.kind == "teacher" and not e.is_reference and not e.is_unguided]
    for key in ("nfe", "steps"):
        for teacher in teachers:
            if teacher.row[key] == entry.row[key]:
                return teacher
    return None


def image_order(entries: Sequence[Entry]) -> list[Entry]:
    """The reference row, then for each step count the undistilled teacher, the students and other LoRAs."""
    references = [entry for entry in entries if entry.is_reference][:1]
    distilled = [entry for entry in entries if entry.kind != "teacher"]
    order = list(references)
    for steps in sorted({entry.steps for entry in distilled}, reverse=True):
        for kind in ("teacher", "student", "lora"):
            order += [e for e in entries if e.kind == kind and e.steps == steps and e not in order]
    return order


def _same(one: Entry, other: Entry) -> bool:
    """Whether two rows have equal numbers in every metric; their cost is not compared, since every run times it anew."""
    for key in {**one.run.metrics, **other.run.metrics}:
        mine, theirs = one.value(key), other.value(key)
        if mine is None or theirs is None:
            if mine != theirs:
                return False
        elif not math.isclose(mine, theirs, rel_tol=_SAME, abs_tol=_SAME):
            return False
    return True
