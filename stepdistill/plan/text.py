"""The plan of a run as text: does it fit, how long, what does it cost, and what would fit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepdistill.config.load import load_config
from stepdistill.config.shipped import shipped_configs
from stepdistill.plan.cards import GIB
from stepdistill.plan.disk_need import DiskNeed
from stepdistill.plan.real_update import MeasuredUpdate
from stepdistill.plan.whole_run import PhaseCost, RunPlan

_WORKING_GIB = 1.0
"""What should stay free for the working memory of kernels and for fragments."""


@dataclass(frozen=True)
class Costs:
    """How many cards train together, and the price of an hour of one, in any currency; None: no costs are shown."""

    cards: int = 1
    price: float | None = None


def verdict(plan: RunPlan) -> str:
    """One line: whether the run fits the card, and what needs most."""
    margin = plan.card.usable_gib - plan.peak / GIB
    if not plan.fits:
        answer = f"{-margin:.1f} GiB too few"
    elif margin < _WORKING_GIB:
        answer = f"it just fits, {margin:.1f} GiB to spare, and may run out of memory"
    else:
        answer = f"it fits, {margin:.1f} GiB to spare"
    training = f"; training {plan.training_peak / GIB:.1f}" if plan.largest in plan.stages else ""
    needs = f"the run needs {plan.peak / GIB:.1f} GiB ({plan.largest}{training})"
    return f"{needs}; {plan.card.name}, has {plan.card.usable_gib:.1f} GiB: {answer}"


def plan_text(
    plan: RunPlan, *, disk: DiskNeed | None, changes: tuple[list[str], RunPlan] | None, costs: Costs
) -> str:
    """The whole plan.

    Args:
        plan: the plan.
        disk: the bytes that the run writes; None if that is not known yet.
        changes: if the run does not fit, what would (`smaller_run`).
        costs: number of cards and price of an hour.
    """
    return "\n".join(
        [
            verdict(plan),
            "",
            *_memory(plan),
            "",
            *_time(plan),
            "",
            *_totals(plan, costs),
            *_disk(disk),
            *_changes(plan, changes),
        ]
    )


def measured_title(device: torch.device) -> str:
    """The title of the lines of `measured_line`."""
    of = "tensors" if device.type == "cuda" else "the process beyond its libraries"
    return f"measured on {device.type}: a micro-batch with one move of the teacher, and the optimisers; memory of {of}"


def measured_line(cost: PhaseCost, measured: MeasuredUpdate, device: torch.device) -> str:
    """One phase: measured and planned memory and time. The time on a CPU has no error: the plan is for a card."""
    planned, seconds = cost.update, measured.seconds
    least = planned.micro.seconds
    error = f" ({seconds / least - 1:+.0%})" if device.type == "cuda" else ""
    return (
        f"  {cost.title}: {measured.peak / GIB:.2f} GiB, planned {planned.peak / GIB:.2f} "
        f"({measured.peak / planned.peak - 1:+.0%}); {seconds:.2f} s, planned on the card {least:.2f} s{error}; "
        f"{planned.micro.flop / seconds / 1e12:.2f} TFLOP/s"
    )


def _memory(plan: RunPlan) -> Iterator[str]:
    titles = list(dict.fromkeys(cost.phase.title for cost in plan.phases))
    largest = ([cost for cost in plan.phases if cost.phase.title == title] for title in titles)
    shown = [max(costs, key=lambda cost: cost.update.peak) for costs in largest]
    names = list(dict.fromkeys(name for cost in shown for name in cost.update.parts))
    yield "memory at the peak of the largest phase of each kind, GiB"
    width = max(map(len, (*names, *plan.stages)))
    yield f"  {'':{width}}  " + "  ".join(f"{title:>{max(8, len(title))}}" for title in titles)
    rows = [(name, [cost.update.parts.get(name, 0) for cost in shown]) for name in names]
    rows.append(("in all", [cost.update.peak for cost in shown]))
    for name, sizes in rows:
        cells = (f"{size / GIB:>{max(8, len(title))}.2f}" for size, title in zip(sizes, titles, strict=True))
        yield f"  {name:{width}}  " + "  ".join(cells)
    for name, size in plan.stages.items():
        left_out = (
            "" if name != "previews" or plan.has_previews else "  more than the card has: they are left out"
        )
        yield f"  {name:{width}}  {size / GIB:>{max(8, len(titles[0]))}.2f}{left_out}"


def _time(plan: RunPlan) -> Iterator[str]:
    width = max(len(cost.title) for cost in plan.phases)
    titles = "     TFLOP    kernels  GiB moved   seconds   updates    hours"
    yield f"  {'an update':{width}}{titles}"
    for cost in plan.phases:
        total = cost.update.total
        yield (
            f"  {cost.title:{width}}  {total.flop / 1e12:8,.1f}  {total.kernels:9,.0f}  {total.moved / GIB:9,.0f}  "
            f"{total.seconds:8.2f}  {cost.phase.max_train_steps:8,}  {cost.seconds / 3600:7.2f}"
        )


def _totals(plan: RunPlan, costs: Costs) -> Iterator[str]:
    drawing = {"images drawn by the teacher": plan.preparation} if plan.preparation else {}
    seconds = {"training": sum(cost.seconds for cost in plan.phases)}
    # the cards share the images; training's updates are those of one card's micro-batches
    seconds |= {name: of / costs.cards for name, of in (drawing | {"evaluation": plan.evaluation}).items()}
    whole = sum(seconds.values())
    if_it_fitted = "" if plan.fits else ", if it fitted"
    yield f"time{if_it_fitted}: {', '.join(f'{name} {_hours(of)}' for name, of in seconds.items())}; in all {_hours(whole)}"
    yield (
        "      at the rates that large kernels reach on this card; no card has measured it yet (docs/performance.md)"
    )
    if plan.card.is_guess:
        yield "      of a card whose speed is a guess by its memory: --gpu rtx3060, for example, names yours"
    if plan.config.training.base_quantization != "none":
        yield "      without the time in which each pass converts the quantised weights"
    if costs.cards > 1:
        yield from _update_of_cards(plan, costs.cards)
    if costs.price is None:
        return
    hourly = costs.cards * costs.price / 3600
    yield f"cost: {whole * hourly:,.2f} at {costs.price:g} an hour of a card"
    for what, of in _rung_seconds(plan).items():
        yield f"      {of * hourly:,.2f} of it to train {what}"


def _update_of_cards(plan: RunPlan, cards: int) -> Iterator[str]:
    """How large an update of several cards is, and the setting that keeps it as large as that of one."""
    training = plan.config.training
    micro = training.gradient_accumulation_steps
    samples = training.train_batch_size * micro
    yield f"      on each of {cards} cards; an update then takes {cards * samples} samples in place of {samples}"
    if micro % cards == 0:
        yield f"      training.gradient_accumulation_steps={micro // cards} keeps {samples} and trains {cards} times as fast"


def _rung_seconds(plan: RunPlan) -> dict[str, float]:
    """The least seconds of the training of a smaller base and of each rung."""
    seconds: dict[str, float] = {}
    for cost in plan.phases:
        what = f"the {cost.rung.student_steps}-step rung" if cost.name is None else "the smaller base"
        seconds[what] = seconds.get(what, 0.0) + cost.seconds
    return seconds


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:,.1f} min"


def _profiles(plan: RunPlan) -> list[str]:
    """The names of the other shipped configs of the run's teacher."""
    own = plan.config
    others = {name: load_config(path) for name, path in shipped_configs().items()}
    return [
        name
        for name, config in others.items()
        if config.teacher.path == own.teacher.path and config.name != own.name
    ]


def _disk(disk: DiskNeed | None) -> Iterator[str]:
    if disk is None:
        yield "disk: known when the data are on this disk; `stepdistill doctor` tells"
        return
    parts = ("teacher", "base", "cache", "rungs", "checkpoints", "evaluation", "report")
    each = ", ".join(f"{part} {size / GIB:.1f}" for part in parts if (size := getattr(disk, part)) > GIB / 20)
    yield f"disk: {disk.total / GIB:.1f} GiB{'' if disk.is_whole else ' or more'} ({each})"


def _changes(plan: RunPlan, changes: tuple[list[str], RunPlan] | None) -> Iterator[str]:
    if plan.fits:
        return
    profiles = _profiles(plan)
    if profiles:
        yield f"made for this model and other cards: {', '.join(profiles)} (`stepdistill plan {profiles[0]}`)"
    if changes is None:
        yield "what would fit: a smaller data.resolution, or a larger card; nothing else that this plan tries"
        return
    settings, smaller = changes
    yield f"what would fit: {' '.join(settings)}"
    yield f"                with it {verdict(smaller)}, {_hours(smaller.seconds)} in all"
