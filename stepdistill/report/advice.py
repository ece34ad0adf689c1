"""What to do next when a number is bad: rules over the numbers at hand, each with the config keys that it is about.

Here: the distances of the whole ladder, and what rules.py says of each rung, put together by remedy.
"""

import itertools
from collections.abc import Iterable, Iterator

from stepdistill.report import rules
from stepdistill.report.entries import Entry, entries_of, equal_passes
from stepdistill.report.read import PhaseLog, Run, RungLog
from stepdistill.report.rules import Advice
from stepdistill.report.signs import difference_error, still_falling

_FAR = 1.5  # times the floor: a distance that is worth updates
_CERTAIN = 2.0  # standard errors that a difference must have not to be chance
_MOST_KEYS = 6


def advice_for(run: Run) -> list[Advice]:
    """The rules that the run's numbers set off, those about distances first."""
    students = {e.steps: e for e in entries_of([run]) if e.kind == "student"}
    reference = next((e for e in entries_of([run]) if e.is_reference), None)
    found = [*_worse_than_undistilled(run, students), *_far_from_teacher(run, students)]
    found += _told_apart(run, students)
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        if student is not None:
            found += [
                *rules.looks(student, rung),
                *rules.prompts(student, rung, reference),
                *rules.diversity(student, rung),
            ]
        for phase in rung.phases:
            found += rules.discriminator(phase, rung)
    return list(_merged([*found, *rules.scales(run)]))


def _merged(found: Iterable[Advice]) -> Iterator[Advice]:
    """One entry for each remedy, with the findings and keys of all rungs that call for it."""
    alike: dict[str, list[Advice]] = {}
    for advice in found:
        alike.setdefault(advice.remedy, []).append(advice)
    for remedy, group in alike.items():
        findings = "; ".join(advice.finding.removesuffix(".") for advice in group)
        keys = dict.fromkeys(key for advice in group for key in advice.keys)
        yield Advice(f"{findings}.", remedy, tuple(keys)[:_MOST_KEYS])


def _worse_than_undistilled(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """Rungs that the base alone beats with as many U-Net passes: they have hardly been trained."""
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        teacher = equal_passes(student, entries_of([run])) if student is not None else None
        if student is None or teacher is None:
            continue
        own, bare = student.value("fid_to_teacher"), teacher.value("fid_to_teacher")
        if own is not None and bare is not None and own > bare:
            yield Advice(
                f"{rung.title}: FID to teacher {own:.2f}, worse than {teacher.name}'s {bare:.2f} without any LoRA.",
                "It was hardly trained, or harmed: give its mse phase many more updates before anything else.",
                (f"{rung.main_phase.key}.max_train_steps",),
            )


def _far_from_teacher(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """The rung that loses the most on the one before it, where it is far above the floor and the loss is no chance."""
    floor = run.floor.get("fid_to_teacher")
    if floor is None:
        return
    worst: tuple[float, RungLog, float, float] | None = None
    before, name = floor, run.reference
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        fid = student.value("fid_to_teacher") if student is not None else None
        if student is None or fid is None:
            continue
        lost, error = fid - before, difference_error(run, student.name, name)
        certain = error is None or lost > _CERTAIN * error
        if lost > 0 and certain and fid > _FAR * floor and (worst is None or lost > worst[0]):
            worst = (lost, rung, fid, before)
        before, name = fid, student.name
    if worst is None:
        return
    _, rung, fid, before = worst
    was = "" if rung is run.rungs[0] else f", {before:.2f} at the rung before"
    remedy, keys = _more_training(rung.main_phase)
    if rung.student_steps <= 2 and rung.node_steps is None:
        remedy += " The recipe trains the 2- and 1-step rungs at the nodes of 4 steps."
        keys.append(f"{rung.key}.node_steps")
    if rung.student_steps == 1 and rung.prediction_type != "sample":
        remedy += " It converts the 1-step rung to x0."
        keys.append(f"{rung.key}.prediction_type")
    yield Advice(
        f"{rung.title}: FID to teacher {fid:.2f}{was}; the floor is {floor:.2f}.", remedy, tuple(keys)
    )


def _more_training(phase: PhaseLog) -> tuple[str, list[str]]:
    updates, rate = f"{phase.key}.max_train_steps", f"{phase.key}.learning_rate"
    falling = still_falling(phase)
    if falling is None:
        return "Give it more updates, or a higher learning rate.", [updates, rate]
    if falling:
        return "Its loss was still falling when the phase ended: give it more updates.", [updates]
    return "Its loss had stopped falling: try a higher learning rate, then a higher rank.", [
        rate,
        "lora.rank",
    ]


def _told_apart(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """Neighbouring rungs whose FIDs to the teacher differ by less than their difference's own error: see the legend of
    `difference_error`."""
    pairs = []
    for first, second in itertools.pairwise(students.values()):
        a, b = first.value("fid_to_teacher"), second.value("fid_to_teacher")
        error = difference_error(run, first.name, second.name)
        if a is not None and b is not None and error is not None and abs(a - b) < _CERTAIN * error:
            pairs.append(
                f"{first.name} and {second.name} ({a:.2f} and {b:.2f}, the difference ± {error:.2f})"
            )
    if pairs:
        yield Advice(
            f"FID to teacher: the order of {', of '.join(pairs)} may be chance.",
            "To tell them apart, draw more images.",
            ("evaluation.num_images",),
        )
