"""The plan of a run as text: does it fit, how long, what does it cost, and what would fit."""

from collections.abc import Iterator

import torch

from stepdistill.plan.disk_need import DiskNeed
from stepdistill.plan.real_update import MeasuredUpdate
from stepdistill.plan.whole_run import GIB, PhaseCost, RunPlan

_ROLES = ("teacher", "student", "discriminator", "optimiser")


def verdict(plan: RunPlan) -> str:
    """One line: whether the run fits the card, and what needs most."""
    needs = f"the run needs {plan.peak / GIB:.1f} GiB ({plan.largest}); {plan.card.name} has {plan.card.usable_gib:.1f}"
    margin = plan.card.usable_gib - plan.peak / GIB
    return f"{needs}: {f'it fits, {margin:.1f} GiB to spare' if plan.fits else f'{-margin:.1f} GiB too few'}"


def plan_text(
    plan: RunPlan, *, disk: DiskNeed | None, changes: tuple[list[str], RunPlan] | None, price: float | None
) -> str:
    """The whole plan.

    Args:
        plan: the plan.
        disk: the bytes that the run writes; None if that is not known yet.
        changes: if the run does not fit, what would (`smaller_run`).
        price: of an hour of the card, in any currency.
    """
    return "\n".join(
        [
            verdict(plan),
            "",
            *_memory(plan),
            "",
            *_time(plan),
            "",
            *_totals(plan, price),
            *_disk(disk),
            *_changes(plan, changes),
        ]
    )


def measured_title(device: torch.device) -> str:
    """The title of the lines of `measured_line`."""
    of = "tensors" if device.type == "cuda" else "the process beyond its libraries"
    return f"measured on {device.type}: a micro-batch with one move of the teacher, and the optimisers; memory of {of}"


def measured_line(cost: PhaseCost, measured: MeasuredUpdate) -> str:
    """One phase: measured and planned memory and time."""
    planned = cost.update
    return (
        f"  {cost.title}: {measured.peak / GIB:.2f} GiB, planned {planned.peak / GIB:.2f} "
        f"({measured.peak / planned.peak - 1:+.0%}); {measured.seconds:.2f} s, planned on the card "
        f"{planned.micro.seconds:.2f} s; {planned.micro.flop / measured.seconds / 1e12:.2f} TFLOP/s"
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
        yield f"  {name:{width}}  {size / GIB:>{max(8, len(titles[0]))}.2f}"


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


def _totals(plan: RunPlan, price: float | None) -> Iterator[str]:
    training = sum(cost.seconds for cost in plan.phases)
    parts = [f"training {_hours(training)}", f"evaluation {_hours(plan.evaluation)}"]
    if plan.preparation:
        parts.insert(0, f"images drawn by the teacher {_hours(plan.preparation)}")
    yield f"time: {', '.join(parts)}; in all {_hours(plan.seconds)}"
    yield (
        "      at the rates that large kernels reach on this card; no card has measured it yet (docs/performance.md)"
    )
    if price is not None:
        yield f"cost: {plan.seconds / 3600 * price:,.2f} at {price:g} an hour"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:,.1f} min"


def _disk(disk: DiskNeed | None) -> Iterator[str]:
    if disk is None:
        yield "disk: known when the data are on this disk; `stepdistill doctor` tells"
        return
    parts = ("teacher", "cache", "rungs", "checkpoints", "evaluation", "report")
    each = ", ".join(f"{part} {size / GIB:.1f}" for part in parts if (size := getattr(disk, part)) > GIB / 20)
    yield f"disk: {disk.total / GIB:.1f} GiB{'' if disk.is_whole else ' or more'} ({each})"


def _changes(plan: RunPlan, changes: tuple[list[str], RunPlan] | None) -> Iterator[str]:
    if plan.fits:
        return
    if changes is None:
        yield "what would fit: nothing that this plan tries; a larger card"
        return
    settings, smaller = changes
    yield f"what would fit: {' '.join(settings)}"
    yield f"                with it {verdict(smaller)}, {_hours(smaller.seconds)}"
