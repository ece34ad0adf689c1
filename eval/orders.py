"""Whether two readers put the methods in the same order, at each step count.

Kendall's tau-b compares the orders of the means over seeds: 1 if they are the same, -1 if one is the reverse of the other.
A pair of methods flips if both readers see a difference larger than its spread, but in opposite directions. The spread is
the standard deviation of the difference over the seeds. With a single seed, it is twice the standard error by the jackknife
(stepdistill/jackknife.py).
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from side_by_side import MEASURES, STEPS, Table, step_count

from stepdistill.jackknife import difference_error

COMPARED = ("fid_to_real", "fid_to_teacher", "prompt_accuracy")


@dataclass(frozen=True)
class Side:
    """One reader's measurements: by method, a value per seed, and for a single seed the jackknife's replicates."""

    values: Mapping[str, Sequence[float]]
    replicates: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def means(self) -> list[float]:
        """Means over the seeds, in the order of the methods."""
        return [statistics.fmean(values) for values in self.values.values()]

    def difference(self, first: str, second: str) -> tuple[float, float]:
        """The mean difference of two methods over the seeds, and its spread."""
        differences = [a - b for a, b in zip(self.values[first], self.values[second], strict=True)]
        if len(differences) > 1:
            spread = statistics.stdev(differences)
        else:
            spread = 2 * difference_error(self.replicates.get(first, ()), self.replicates.get(second, ()))
        return statistics.fmean(differences), spread


@dataclass(frozen=True)
class Flip:
    """Two methods that the readers put in opposite orders: each reader's mean difference and its spread."""

    methods: tuple[str, str]
    by_first: tuple[float, float]
    by_second: tuple[float, float]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows ties (Kendall 1945). None if all values of one side are tied."""
    pairs = [
        (_sign(a - b), _sign(c - d))
        for (a, c), (b, d) in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    scale = math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))
    return sum(x * y for x, y in pairs) / scale if scale else None


def flips(first: Side, second: Side) -> list[Flip]:
    """The pairs of methods that both readers tell apart, but in opposite orders."""
    flipped = []
    for pair in itertools.combinations(first.values, 2):
        (a, a_spread), (b, b_spread) = first.difference(*pair), second.difference(*pair)
        if a * b < 0 and abs(a) > a_spread and abs(b) > b_spread:
            flipped.append(Flip(pair, (a, a_spread), (b, b_spread)))
    return flipped


def agreement(tables: Sequence[Table], methods: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """A Markdown table of tau by measure and step count with the flips below it, and the same as data. Both are empty if the
    tables have no measures of a second reader."""
    entries = [
        _entry(tables, methods, measure, steps)
        for measure in COMPARED
        for steps in STEPS
        if any({measure, f"second_{measure}"} <= row.keys() for row in tables[0].rows.values())
    ]
    if not entries:
        return "", []
    lines = ["| tau between the readers | " + " | ".join(map(step_count, STEPS)) + " |"]
    lines.append("| --- |" + " ---: |" * len(STEPS))
    for measure in dict.fromkeys(entry["measure"] for entry in entries):
        cells = ["" if e["tau"] is None else f"{e['tau']:.2f}" for e in entries if e["measure"] == measure]
        lines.append(f"| {MEASURES[measure][0]} | " + " | ".join(cells) + " |")
    sentences = [line for entry in entries for line in _sentences(entry)]
    spread = "their deviations over the seeds" if len(tables) > 1 else "twice their standard errors"
    lines += [
        "",
        f"Pairs in another order by the second reader, both differences beyond {spread}: {len(sentences)}.",
    ]
    return "\n".join([*lines, *(["", *sentences] if sentences else [])]), entries


def _entry(tables: Sequence[Table], methods: Sequence[str], measure: str, steps: int) -> dict[str, Any]:
    first, second = (_side(tables, methods, key, steps) for key in (measure, f"second_{measure}"))
    flipped = [vars(flip) for flip in flips(first, second)]
    tau = kendall_tau(first.means, second.means)
    return {"measure": measure, "steps": steps, "methods": list(first.values), "tau": tau, "flips": flipped}


def _side(tables: Sequence[Table], methods: Sequence[str], key: str, steps: int) -> Side:
    rows = {method: f"{method}-{steps}" for method in methods if f"{method}-{steps}" in tables[0].rows}
    values = {method: [table.rows[row][key] for table in tables] for method, row in rows.items()}
    by_row = tables[0].replicates if len(tables) == 1 else {}
    replicates = {method: by_row[row][key] for method, row in rows.items() if key in by_row.get(row, {})}
    return Side(values, replicates)


def _sentences(entry: dict[str, Any]) -> list[str]:
    title, spec = MEASURES[entry["measure"]]
    return [
        f"- {title}, {step_count(entry['steps'])}: {flip['methods'][0]} less {flip['methods'][1]} is "
        + " by the shipped reader, ".join(
            f"{d:+{spec}} ± {s:{spec}}" for d, s in (flip["by_first"], flip["by_second"])
        )
        + " by the second"
        for flip in entry["flips"]
    ]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
