"""Chooses which activations are kept and which are computed again, so that training fills a memory budget and no more.

Modules are kept in the order of the arithmetic that a byte saves. How many of them fit is found by dry updates of the phase
itself, because a discriminator's passes keep the activations of the same modules a second time.
"""

import bisect
import functools
import itertools
import logging
import math

from stepdistill.config import ConfigError, Phase, RunConfig, Rung
from stepdistill.plan.cards import CARDS
from stepdistill.plan.dry_update import DryRun, Segment
from stepdistill.plan.passes import is_base_teacher
from stepdistill.plan.whole_run import GIB, phases_of
from stepdistill.teacher.facts import TeacherFacts

logger = logging.getLogger(__name__)
Keeps = dict[tuple[int, int], list[str]]
"""Names of the modules whose activations are kept, by student_steps of the rung and number of the phase."""
_ANY_CARD = CARDS["rtx4090"]  # memory does not depend on it


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
        "memory budget: counting which activations fit %s; for SDXL some minutes",
        config.training.memory_budget,
    )
    dry_run = DryRun(config, request.facts, _ANY_CARD)
    segments = sorted(dry_run.segments(), key=lambda s: s.flop / max(s.kept, 1), reverse=True)
    budget = config.training.memory_budget_bytes or 0.0
    phases = [(rung, number, phase, _kind(config, rung, phase)) for rung, number, phase in phases_of(config)]
    distinct = {kind: (rung, phase) for rung, _, phase, kind in phases}
    _check_least(dry_run, list(distinct.values()), budget)
    kept = {kind: _most(dry_run, *of, segments, budget) for kind, of in distinct.items()}
    return {(rung.student_steps, number): kept[kind] for rung, number, _, kind in phases}


def _kind(config: RunConfig, rung: Rung, phase: Phase) -> tuple[object, ...]:
    """What the memory of an update depends on: not on how many moves the teacher makes, of which none keeps memory."""
    same = phase.model_copy(update={"max_train_steps": 1, "learning_rate": 1.0, "teacher_steps": None})
    return same.model_dump_json(), is_base_teacher(config, rung, phase), rung.start_timestep is None


def _check_least(dry_run: DryRun, phases: list[tuple[Rung, Phase]], budget: float) -> None:
    """ConfigError if a phase needs more than the budget even if it computes all activations again."""
    needs = [(dry_run.update(rung, phase).peak, rung, phase) for rung, phase in phases]
    most, rung, phase = max(needs, key=lambda need: need[0])
    if most > budget:
        raise ConfigError(
            f"training.memory_budget: got {budget / GIB:g} GiB, but {rung.teacher_steps} -> {rung.student_steps} "
            f"{phase.title} needs {most / GIB:.1f} GiB with all activations computed again; fix: "
            f"training.memory_budget={math.ceil(most / GIB)}GiB, or a smaller training.train_batch_size or lora.rank"
        )


def _most(dry_run: DryRun, rung: Rung, phase: Phase, segments: list[Segment], budget: float) -> list[str]:
    """The names of the most segments, from the first on, whose activations can be kept."""

    sizes = list(itertools.accumulate((s.kept for s in segments), initial=0))

    def peak(count: int) -> int:
        return dry_run.update(rung, phase, keeps=[s.name for s in segments[:count]]).peak

    fewest, most = 0, len(segments)
    least, largest = peak(fewest), peak(most)
    if largest <= budget:
        return [s.name for s in segments]
    while most - fewest > 1:  # the peak grows nearly in proportion to what is kept
        share = (budget - least) / (largest - least)
        guess = bisect.bisect_right(sizes, sizes[fewest] + share * (sizes[most] - sizes[fewest])) - 1
        middle = min(max(guess, fewest + 1), most - 1)
        size = peak(middle)
        if size <= budget:
            fewest, least = middle, size
        else:
            most, largest = middle, size
    return [s.name for s in segments[:fewest]]
