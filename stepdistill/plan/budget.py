"""Chooses which activations are kept and which are computed again, so that training fills a memory budget and no more.

Modules are kept in the order of the arithmetic that a byte saves. How many of them fit is found by dry updates of the phase
itself, because a discriminator's passes keep the activations of the same modules a second time.
"""

import functools

from stepdistill.config import ConfigError, Phase, RunConfig, Rung
from stepdistill.plan.cards import CARDS
from stepdistill.plan.dry_update import DryRun, Segment
from stepdistill.plan.whole_run import GIB, phases_of, what_matters
from stepdistill.teacher.facts import TeacherFacts

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
            config.model_dump_json(include={"training", "lora", "ladder", "teacher", "data"}),
            facts.folder,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Request) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache
def _kept_modules(request: _Request) -> Keeps:
    config = request.config
    dry_run = DryRun(config, request.facts, _ANY_CARD)
    segments = sorted(dry_run.segments(), key=lambda s: s.flop / max(s.kept, 1), reverse=True)
    known: dict[object, list[str]] = {}
    keeps: Keeps = {}
    for rung, number, phase in phases_of(config):
        alike = what_matters(config, rung, phase)
        if alike not in known:
            known[alike] = _most(dry_run, rung, phase, segments, config.training.memory_budget_bytes or 0.0)
        keeps[rung.student_steps, number] = known[alike]
    return keeps


def _most(dry_run: DryRun, rung: Rung, phase: Phase, segments: list[Segment], budget: float) -> list[str]:
    """The names of the most segments, from the first on, whose activations can be kept; ConfigError if not even none fit."""

    def fits(count: int) -> bool:
        return dry_run.update(rung, phase, keeps=[s.name for s in segments[:count]]).peak <= budget

    needed = dry_run.update(rung, phase).peak
    if needed > budget:
        raise ConfigError(
            f"training.memory_budget: got {budget / GIB:g} GiB, but {rung.teacher_steps} -> {rung.student_steps} "
            f"{phase.title} needs {needed / GIB:.1f} GiB with all activations computed again; fix: `stepdistill plan` with "
            f"--gpu {budget / GIB:g}GB names settings that fit"
        )
    fewest, most = 0, len(segments)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
    return [s.name for s in segments[:fewest]]
