"""Answers from the log and the table: is a loss still falling, was a student or a discriminator destroyed, is a
discriminator at chance or too strong, how large is the standard error of the difference between two rows?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stepdistill import jackknife
from stepdistill.report.read import PhaseLog, Run

_CHANCE = 0.55
_CERTAIN = 0.95
_FIRST_UPDATES = 3  # in which the learning rate warms up
_DESTROYED = 3.0  # times the loss of a student without training
_RISEN = 1.5  # times the loss of a discriminator that guesses
_ONE_SIDED = 0.7  # difference of the two accuracies
_VANISHED = 0.01  # times the largest gradient
_GUESSING = {"non_saturating": 2 * math.log(2), "relativistic": math.log(2)}
"""The discriminator's loss if it gives all samples the same logit of 0, by the kind of its loss."""
_STILL_FALLING = 0.05
_MIN_UPDATES = 8


@dataclass(frozen=True)
class Adversary:
    """A discriminator's problem (at chance, destroyed by its learning rate, or too strong), and its accuracy (0 to 1)."""

    state: Literal["at chance", "destroyed", "too strong"]
    accuracy: float


def still_falling(phase: PhaseLog) -> bool | None:
    """Whether the mean loss fell by more than 5 % from the third to the last quarter of the log; None if the log is too
    short, and for a phase with a critic, whose loss is no distance."""
    losses = phase.values("student_loss")
    if phase.has_critic or len(losses) < _MIN_UPDATES:
        return None
    *_, third, last = _quarter_means(losses)
    return last < (1 - _STILL_FALLING) * third


def destroyed_student(phase: PhaseLog) -> tuple[float, float] | None:
    """(least loss of the first updates, mean of the last quarter) if the loss ended far above where it began, with a student
    that had learned nothing yet; None if it did not, if the log is too short, and for a phase with a critic, whose loss is
    no distance. A learning rate that is far too high takes effect with the second update."""
    losses = phase.values("student_loss")
    if phase.has_critic or len(losses) < _MIN_UPDATES:
        return None
    began, ended = min(losses[:_FIRST_UPDATES]), _quarter_means(losses)[-1]
    return (began, ended) if ended > _DESTROYED * began else None


def adversary(phase: PhaseLog, *, loss: str | None = None) -> Adversary | None:
    """The discriminator's problem; None if it has none, or the log is too short.

    at chance   right about half of the time in every quarter of the log, or less often: equal logits count as wrong
    destroyed   no better than chance in the last half, and its loss was far above that of guessing for a quarter, or its
                logits became constant: nearly all of real and student samples on one side, or no gradient any more
    too strong  nearly always right in the last quarter, while the student's loss rose

    loss: the kind of the discriminator's loss, which says what guessing costs; None if it is not known.
    """
    real, student = (phase.values(f"discriminator_accuracy_{of}") for of in ("real", "student"))
    accuracy = [(a + b) / 2 for a, b in zip(real, student, strict=False)]
    losses = phase.values(phase.adversarial_loss)
    if min(len(accuracy), len(losses)) < _MIN_UPDATES:
        return None
    quarters, of_student = _quarter_means(accuracy), _quarter_means(losses)
    last_half = (quarters[2] + quarters[3]) / 2
    if last_half <= _CHANCE and _is_destroyed(phase, real, student, loss):
        return Adversary("destroyed", last_half)
    if max(quarters) <= _CHANCE:
        return Adversary("at chance", sum(accuracy) / len(accuracy))
    if quarters[-1] >= _CERTAIN and of_student[-1] > of_student[0]:
        return Adversary("too strong", quarters[-1])
    return None


def _is_destroyed(phase: PhaseLog, real: Sequence[float], student: Sequence[float], loss: str | None) -> bool:
    """Whether a discriminator that is at chance shows signs of a learning rate that is far too high."""
    last = len(real) * 3 // 4
    apart = [abs(a - b) for a, b in zip(real[last:], student[last:], strict=False)]
    if sum(apart) / len(apart) > _ONE_SIDED:
        return True
    costs, norms = (phase.values(f"discriminator_{name}") for name in ("loss", "grad_norm"))
    if len(costs) >= _MIN_UPDATES and max(_quarter_means(costs)) > _RISEN * _GUESSING.get(loss or "", 1.4):
        return True
    if len(norms) < _MIN_UPDATES:
        return False
    of_norms = _quarter_means(norms)
    return of_norms[-1] <= _VANISHED * max(of_norms)


def error_of_difference(
    run: Run, first: str, second: str | None, *, metric: str = "fid_to_teacher"
) -> float | None:
    """Standard error of the difference between two rows in a metric; None if either row has no replicates of the metric."""
    one, other = (run.replicates.get(name or "", {}).get(metric) or [] for name in (first, second))
    return jackknife.difference_error(one, other) if one and len(one) == len(other) else None


def _quarter_means(values: Sequence[float]) -> list[float]:
    n = len(values)
    quarters = [values[n * k // 4 : n * (k + 1) // 4] for k in range(4)]
    return [sum(quarter) / len(quarter) for quarter in quarters]
