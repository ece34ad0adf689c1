"""Whether two readers put methods in the same order, step count by step count.

Kendall's tau-b is 1 where the orders of the means over seeds are the same and -1 where one is the other turned round. A pair
of methods flips where both readers see a difference beyond its deviation over the seeds, each in the other direction.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from side_by_side import MEASURES, STEPS, Table, step_count

COMPARED = ("fid_to_real", "fid_to_teacher", "prompt_accuracy")
Values = Mapping[str, Sequence[float]]  # a value a seed, by method


@dataclass(frozen=True)
class Flip:
    """Two methods whose order the readers see the other way round: mean difference and its deviation by each of them."""

    methods: tuple[str, str]
    by_first: tuple[float, float]
    by_second: tuple[float, float]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Tau-b, which allows ties (Kendall 1945); None where one side has nothing but ties."""
    pairs = [
        (_sign(a - b), _sign(c - d))
        for (a, c), (b, d) in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    scale = math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))
    return sum(x * y for x, y in pairs) / scale if scale else None


def flips(first: Values, second: Values) -> list[Flip]:
    """The pairs that both readers tell apart, in other orders. One seed has no deviation: every difference counts."""
    turned = []
    for pair in itertools.combinations(first, 2):
        (a, one), (b, other) = _difference(first, *pair), _difference(second, *pair)
        if a * b < 0 and abs(a) > one and abs(b) > other:
            turned.append(Flip(pair, (a, one), (b, other)))
    return turned


def agreement(tables: Sequence[Table], methods: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Markdown with tau by measure and step count and below it the flips, and the same as data. Nothing where the tables
    have no second reader's measures."""
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
    sentences = [line for entry in entries for line in _sentences(entry, several=len(tables) > 1)]
    beyond = "by more than the difference's deviation over the seeds" if len(tables) > 1 else "of one seed"
    lines += ["", f"Pairs of methods in another order by the second reader, {beyond}: {len(sentences)}."]
    return "\n".join([*lines, *(["", *sentences] if sentences else [])]), entries


def _entry(tables: Sequence[Table], methods: Sequence[str], measure: str, steps: int) -> dict[str, Any]:
    values = [
        {
            method: [table.rows[f"{method}-{steps}"][key] for table in tables]
            for method in methods
            if all(key in table.rows.get(f"{method}-{steps}", {}) for table in tables)
        }
        for key in (measure, f"second_{measure}")
    ]
    tau = kendall_tau(*(list(map(statistics.fmean, v.values())) for v in values))
    turned = [vars(flip) for flip in flips(*values)]
    return {"measure": measure, "steps": steps, "methods": list(values[0]), "tau": tau, "flips": turned}


def _sentences(entry: dict[str, Any], *, several: bool) -> list[str]:
    title, spec = MEASURES[entry["measure"]]
    return [
        f"- {title}, {step_count(entry['steps'])}: {flip['methods'][0]} less {flip['methods'][1]} is "
        + " by the shipped reader, ".join(
            f"{d:+{spec}}" + (f" ± {s:{spec}}" if several else "")
            for d, s in (flip["by_first"], flip["by_second"])
        )
        + " by the second"
        for flip in entry["flips"]
    ]


def _difference(values: Values, first: str, second: str) -> tuple[float, float]:
    differences = [a - b for a, b in zip(values[first], values[second], strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
