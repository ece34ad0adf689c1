"""What would fit: changes of a config with which a run that needs too much memory fits its card."""

from collections.abc import Iterator

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.load import changed as with_changes
from stepdistill.config.plain_yaml import plain_yaml
from stepdistill.config.saved import resolved
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import GIB, Card
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.other_stages import OtherStages
from stepdistill.plan.whole_run import PhaseCost, RunPlan, plan_run
from stepdistill.teacher.facts import TeacherFacts

_BESIDE_BUDGET = 2.0
"""GiB of a card that a proposed budget leaves to the working memory of kernels."""


def smaller_run(config: RunConfig, facts: TeacherFacts, plan: RunPlan) -> tuple[list[str], RunPlan] | None:
    """Changes with which a run fits the card of its plan, those first that cost no quality; None if none are enough.

    Returns the changes as key=value and the plan with them. What needs too much memory is changed, and nothing else.
    """
    card, changes = plan.card, list[str]()
    too_large, limit = set(plan.too_large), card.usable_gib * GIB
    if "training" in too_large and config.training.memory_budget is not None:
        within = _with_budget_of(config, facts, card)
        if within is not None and within[1].fits:
            return within
        changes = ["training.memory_budget=null"]
        too_large = plan_run(changed(config, changes), facts, card).too_large
    worst = max(plan.phases, key=lambda cost: cost.update.peak)
    for change, relieves in savings(config):
        if relieves not in too_large:
            continue
        changes = [*changes, *change]
        if _needs(changed(config, changes), facts, card, relieves, worst) <= limit:
            too_large.remove(relieves)
    smaller = plan if not changes else plan_run(changed(config, changes), facts, card)
    return (_last_of_each(changes), smaller) if smaller.fits else None


def _with_budget_of(config: RunConfig, facts: TeacherFacts, card: Card) -> tuple[list[str], RunPlan] | None:
    """The run with a memory budget that the card has; None if nothing fits that."""
    changes = [f"training.memory_budget={max(1, int(card.usable_gib - _BESIDE_BUDGET))}GiB"]
    smaller = changed(config, changes)
    try:
        keeps = kept_modules(smaller, facts)
    except ConfigError:
        return None
    return changes, plan_run(smaller, facts, card, keeps=keeps)


def _needs(config: RunConfig, facts: TeacherFacts, card: Card, what: str, worst: PhaseCost) -> int:
    """The most bytes that a stage needs; for "training", those of its worst phase."""
    other = OtherStages(config, facts, card)
    if what == "evaluate":
        return other.evaluate_bytes()
    if what == "prepare":
        return other.prepare_bytes()
    return DryRun(config, facts, card).update(worst.rung, worst.phase).peak


def _last_of_each(changes: list[str]) -> list[str]:
    """The changes without those that a later one of the same key replaces."""
    return list({change.partition("=")[0]: change for change in changes}.values())


def savings(config: RunConfig) -> Iterator[tuple[list[str], str]]:
    """Changes that save memory, and what needs less with each: "training" or the name of another stage."""
    training = config.training
    yield ["evaluation.batch_size=1"], "evaluate"
    if config.evaluation.dtype == "float32":
        yield ["evaluation.dtype=bfloat16"], "evaluate"
    yield ["data.vae_dtype=bfloat16"], "prepare"
    if config.data.text_dtype == "float32":
        yield ["data.text_dtype=bfloat16"], "prepare"
    if training.mixed_precision == "no":
        yield ["training.mixed_precision=bf16"], "training"
    if not training.gradient_checkpointing:
        yield ["training.gradient_checkpointing=true"], "training"
    samples = training.train_batch_size * training.gradient_accumulation_steps
    size = training.train_batch_size
    while size > 1:
        size = next(smaller for smaller in range(size // 2, 0, -1) if size % smaller == 0)
        split = [
            f"training.train_batch_size={size}",
            f"training.gradient_accumulation_steps={samples // size}",
        ]
        yield split, "training"
    if training.base_quantization == "none":
        yield ["training.base_quantization=int8"], "training"
    rank = config.lora.rank
    while rank > 16:
        rank //= 2
        yield [f"lora.rank={rank}"], "training"
    if training.base_quantization != "nf4":
        yield ["training.base_quantization=nf4"], "training"


def changed(config: RunConfig, changes: list[str]) -> RunConfig:
    """The config with key=value changes."""
    pairs = (change.partition("=") for change in changes)
    return with_changes(resolved(config), {key: plain_yaml(value) for key, _, value in pairs})
