"""The plan of a run: whether it fits a card, how long it takes there and what it costs, rung by rung."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.plan.cards import GIB, Card, nearest_card
from stepdistill.plan.dry_shrink import shrink_rung, shrink_update
from stepdistill.plan.dry_update import DryRun, UpdateCost
from stepdistill.plan.other_stages import OtherStages
from stepdistill.plan.passes import evaluation_forwards, is_base_teacher, preparation_forwards
from stepdistill.run.start_from import taken_steps
from stepdistill.runtime import WEIGHT_DTYPES
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.small_base import base_record


@dataclass(frozen=True)
class PhaseCost:
    """One phase of one rung, and what one update of it takes."""

    rung: Rung
    phase: Phase
    update: UpdateCost
    name: str | None = None

    @property
    def title(self) -> str:
        """Such as "32 -> 8 mse", or "shrink output+denoise+l2"."""
        if self.name is not None:
            return f"{self.name} {self.phase.title}"
        return f"{self.rung.teacher_steps} -> {self.rung.student_steps} {self.phase.title}"

    @property
    def seconds(self) -> float:
        """The least seconds of the whole phase."""
        return self.phase.max_train_steps * self.update.total.seconds


@dataclass(frozen=True)
class RunPlan:
    """What a run takes on a card. stages: peak bytes of what is not training, by name; evaluation, preparation: seconds."""

    config: RunConfig
    card: Card
    phases: list[PhaseCost]
    stages: dict[str, int]
    preparation: float
    evaluation: float

    @property
    def _sizes(self) -> dict[str, int]:
        """Bytes by phase and stage; without previews, which are left out if they do not fit."""
        stages = {name: size for name, size in self.stages.items() if name != "previews"}
        return {cost.title: cost.update.peak for cost in self.phases} | stages

    @property
    def peak(self) -> int:
        """The most bytes that the run needs at once."""
        return max(self._sizes.values())

    @property
    def largest(self) -> str:
        """What needs the most memory: a phase or another stage."""
        return max(self._sizes, key=lambda name: self._sizes[name])

    @property
    def training_peak(self) -> int:
        """The most bytes that training needs at once."""
        return max(cost.update.peak for cost in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the card has enough memory."""
        return self.peak <= self._limit

    @property
    def has_previews(self) -> bool:
        """Whether the card has enough memory for previews."""
        return self.stages["previews"] <= self._limit

    @property
    def too_large(self) -> set[str]:
        """What needs more memory than the card has: "training", or the name of another stage."""
        names = {name for name, size in self._sizes.items() if size > self._limit}
        return {name if name in self.stages else "training" for name in names}

    @property
    def _limit(self) -> float:
        return self.card.usable_gib * GIB

    @property
    def seconds(self) -> float:
        """The least seconds of training, of images that the teacher draws, and of the evaluation."""
        return sum(cost.seconds for cost in self.phases) + self.preparation + self.evaluation


def plan_run(
    config: RunConfig,
    facts: TeacherFacts,
    card: Card,
    *,
    keeps: Mapping[tuple[int, int], Collection[str]] | None = None,
) -> RunPlan:
    """The plan of a run; nothing is read but the teacher's configs. keeps: `kept_modules` of a memory budget."""
    dry_run, other = DryRun(config, facts, card), OtherStages(config, facts, card)
    keeps = keeps or {}
    updates: dict[Any, UpdateCost] = {}
    phases = []
    if config.shrink is not None and base_record(config) is None:
        rung = shrink_rung(config, facts)
        phases.append(PhaseCost(rung, rung.phases[0], shrink_update(config, facts, card), name="shrink"))
    for rung, number, phase in phases_of(config):
        alike = what_matters(config, rung, phase)
        if alike not in updates:
            updates[alike] = dry_run.update(rung, phase, keeps=keeps.get((rung.student_steps, number), ()))
        phases.append(PhaseCost(rung, phase, updates[alike]))
    dtype = WEIGHT_DTYPES[config.training.mixed_precision]
    between = max(cost.update.between for cost in phases)
    each = other.seconds_per_pass()
    stages = {
        "prepare": other.prepare_bytes(),
        "previews": between + other.decode_bytes(dtype),
        "evaluate": other.evaluate_bytes(),
    }
    drawn = preparation_forwards(config)
    return RunPlan(config, card, phases, stages, each * drawn, each * evaluation_forwards(config))


def phases_of(config: RunConfig) -> Iterator[tuple[Rung, int, Phase]]:
    """The phases that the run trains, each with its rung and its number there."""
    taken = taken_steps(config)
    for rung in config.ladder:
        if rung.student_steps not in taken:
            for number, phase in enumerate(rung.phases):
                yield rung, number, phase


def what_matters(config: RunConfig, rung: Rung, phase: Phase) -> tuple[object, ...]:
    """What the cost of an update depends on: phases that are alike in it cost the same."""
    return (
        phase.model_copy(update={"max_train_steps": 1, "learning_rate": 1.0}).model_dump_json(),
        phase.cached_updates and phase.max_train_steps,
        is_base_teacher(config, rung, phase),
        (rung.teacher_steps, rung.student_steps, rung.node_steps) if phase.needs_teacher_moves else None,
        rung.start_timestep is None,
        phase.inputs == "own" and rung.student_steps,
    )


def distinct_phases(plan: RunPlan) -> list[tuple[int, PhaseCost]]:
    """One phase of each kind that costs something else, with its number in its rung."""
    found: dict[object, tuple[int, PhaseCost]] = {}
    for cost in (cost for cost in plan.phases if cost.name is None):
        number = cost.rung.phases.index(cost.phase)
        found.setdefault((cost.phase.title, cost.update.micro.kernels, cost.update.peak), (number, cost))
    return list(found.values())


def card_here() -> Card | None:
    """The GPU of this machine with its own memory, as fast as the most similar card that is known; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return nearest_card(properties.name, properties.total_memory / GIB)
