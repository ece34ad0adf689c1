"""Chooses which activations are kept and which are computed again, so that training fills a memory budget and no more.

Modules are kept in the order of the arithmetic that a byte saves. How many of them fit is found by dry updates of the phase
itself, because a discriminator's passes keep the activations of the same modules a second time.
"""

import bisect
import functools
import itertools
import logging
import math
from collections.abc import Iterable

from stepdistill.config import ConfigError, Phase, RunConfig, Rung
from stepdistill.plan.cards import CARDS, GIB
from stepdistill.plan.dry_update import DryRun, Segment
from stepdistill.plan.passes import is_base_teacher
from stepdistill.plan.whole_run import phases_of
from stepdistill.teacher.facts import TeacherFacts

logger = logging.getLogger(__name__)
Keeps = dict[tuple[int, int], list[str]]
"""Names of the modules whose activations are kept, by student_steps of the rung and number of the phase."""
_ANY_CARD = CARDS["rtx4090"]  # memory does not depend on it
_UNUSED = 0.01
"""Share of a budget that a phase may leave unused; finding less takes more dry updates."""


def kept_modules(config: RunConfig, facts: TeacherFacts) -> Keeps:
    """The modules to keep in every phase of the ladder; {} without a budget. ConfigError if a phase does not fit it."""
    if config.training.memory_budget is None:
        return {}
    return _kept_modules(_Request(config, facts))


class _Request:
    """The arguments of `kept_modules`; equal requests are answered once in a process."""

    def __init__(self, config: RunConfig, facts: TeacherFacts) -> None:
        self.config, self.facts = config, facts
        self._key = (
            config.model_dump_json(include={"lora", "ladder", "teacher"}),
            config.training.model_dump_json(exclude={"compile", "channels_last"}),
            config.data.model_dump_json(exclude={"held_out"}),  # which `settled` fills in
            facts.folder,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Request) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache
def _kept_modules(request: _Request) -> Keeps:
    config = request.config
    logger.info(
        "memory budget: counting which activations fit %s; for SDXL about a minute",
        config.training.memory_budget,
    )
    dry_run = DryRun(config, request.facts, _ANY_CARD)
    segments = sorted(dry_run.segments(), key=lambda s: s.flop / max(s.kept, 1), reverse=True)
    budget = config.training.memory_budget_bytes or 0.0
    phases = [(rung, number, phase, _kind(config, rung, phase)) for rung, number, phase in phases_of(config)]
    kinds = {kind: _Peaks(dry_run, rung, phase, segments) for rung, _, phase, kind in phases}
    counts = dict.fromkeys(kinds, len(segments))
    tight = {kind: peaks for kind, peaks in kinds.items() if peaks[peaks.everything] > budget}
    _check_least(tight.values(), budget)
    guess = 0
    for kind, peaks in tight.items():  # the answer for one kind is often that for the next
        guess = counts[kind] = _most(peaks, budget, guess or peaks.guess(budget))
    return {(rung.student_steps, number): kinds[kind].names(counts[kind]) for rung, number, _, kind in phases}


def _kind(config: RunConfig, rung: Rung, phase: Phase) -> tuple[object, ...]:
    """What the memory of an update depends on: not on how many moves the teacher makes, of which none keeps memory."""
    same = phase.model_copy(update={"max_train_steps": 1, "learning_rate": 1.0, "teacher_steps": None})
    return same.model_dump_json(), is_base_teacher(config, rung, phase), rung.start_timestep is None


class _Peaks:
    """The peak memory of one kind of phase by how many segments keep their activations, from the first on."""

    def __init__(self, dry_run: DryRun, rung: Rung, phase: Phase, segments: list[Segment]) -> None:
        self._dry_run, self.rung, self.phase, self._segments = dry_run, rung, phase, segments
        self._sizes = list(itertools.accumulate((s.kept for s in segments), initial=0))
        self._counted: dict[int, int] = {}
        self.everything = len(segments)

    def __getitem__(self, count: int) -> int:
        """Bytes at the peak of an update, counted once."""
        if count not in self._counted:
            update = self._dry_run.update(self.rung, self.phase, keeps=self.names(count))
            self._counted[count] = update.peak
        return self._counted[count]

    def names(self, count: int) -> list[str]:
        """The names of the first `count` segments."""
        return [s.name for s in self._segments[:count]]

    def guess(self, budget: float) -> int:
        """How many segments fill the budget, by the line through the two counted peaks that are nearest to it."""
        near = sorted(self._counted, key=lambda count: abs(self._counted[count] - budget))[:2]
        low, high = min(near), max(near)
        share = (budget - self._counted[low]) / max(1, self._counted[high] - self._counted[low])
        size = self._sizes[low] + share * (self._sizes[high] - self._sizes[low])
        return bisect.bisect_right(self._sizes, size) - 1


def _check_least(kinds: Iterable[_Peaks], budget: float) -> None:
    """ConfigError if a phase needs more than the budget even if it computes all activations again."""
    largest = max(kinds, key=lambda peaks: peaks[0], default=None)
    if largest is not None and largest[0] > budget:
        rung, phase, need = largest.rung, largest.phase, largest[0] / GIB
        raise ConfigError(
            f"training.memory_budget: got {budget / GIB:.3g} GiB, but {rung.teacher_steps} -> {rung.student_steps} "
            f"{phase.title} needs {need:.1f} GiB with all activations computed again; fix: "
            f"training.memory_budget={math.ceil(need)}GiB, or a smaller training.train_batch_size or lora.rank"
        )


def _most(peaks: _Peaks, budget: float, guess: int) -> int:
    """How many segments can keep their activations, from the first on; less than _UNUSED of the budget, or less than one
    more segment, stays free. All of them do not fit. guess: a number to begin with."""
    fewest, most = 0, peaks.everything
    while most - fewest > 1 and budget - peaks[fewest] > _UNUSED * budget:
        middle = min(max(guess, fewest + 1), most - 1)
        if peaks[middle] <= budget:
            fewest = middle
        else:
            most = middle
        guess = peaks.guess(budget)
    return fewest
