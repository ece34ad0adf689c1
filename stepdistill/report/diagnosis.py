"""Answers from the log and the table: is a loss still falling, is a discriminator at chance or too strong, how large is the
standard error of the difference between two rows?"""

from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill import jackknife
from stepdistill.report.read import PhaseLog, Run

_CHANCE = (0.45, 0.55)
_CERTAIN = 0.95
_STILL_FALLING = 0.05
_FEWEST_UPDATES = 8


@dataclass(frozen=True)
class Adversary:
    """A discriminator that is at chance (`at_chance`) or too strong, and its accuracy (0 to 1)."""

    at_chance: bool
    accuracy: float


def still_falling(phase: PhaseLog) -> bool | None:
    """Whether the mean loss fell by more than 5 % from the third to the last quarter of the log; None if the log is too
    short."""
    losses = phase.values("student_loss")
    if len(losses) < _FEWEST_UPDATES:
        return None
    *_, third, last = _quarter_means(losses)
    return last < (1 - _STILL_FALLING) * third


def adversary(phase: PhaseLog) -> Adversary | None:
    """The discriminator's problem: at chance in every quarter of the log, or nearly always right in the last quarter while
    the student's loss rose; None if neither holds, or the log is too short."""
    both = (phase.values(f"discriminator_accuracy_{of}") for of in ("real", "student"))
    accuracy = [(a + b) / 2 for a, b in zip(*both, strict=False)]
    losses = phase.values("student_loss")
    if min(len(accuracy), len(losses)) < _FEWEST_UPDATES:
        return None
    quarters, loss = _quarter_means(accuracy), _quarter_means(losses)
    if all(_CHANCE[0] <= mean <= _CHANCE[1] for mean in quarters):
        return Adversary(True, sum(accuracy) / len(accuracy))
    if quarters[-1] >= _CERTAIN and loss[-1] > loss[0]:
        return Adversary(False, quarters[-1])
    return None


def difference_error(
    run: Run, first: str, second: str | None, *, metric: str = "fid_to_teacher"
) -> float | None:
    """Standard error of the difference between two rows in a metric; None if either row has no replicates of the metric."""
    one, other = (run.replicates.get(name or "", {}).get(metric) or [] for name in (first, second))
    return jackknife.difference_error(one, other) if one and len(one) == len(other) else None


def _quarter_means(values: Sequence[float]) -> list[float]:
    n = len(values)
    quarters = [values[n * k // 4 : n * (k + 1) // 4] for k in range(4)]
    return [sum(quarter) / len(quarter) for quarter in quarters]
