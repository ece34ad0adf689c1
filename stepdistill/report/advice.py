"""What to do next if a number is bad: rules that look at the measured numbers and propose settings.

This file holds the rules about the distances of the whole ladder, and merges them with the per-rung advice of rules.py: one
entry per remedy. Proposals that the config would reject are dropped.
"""

import itertools
from collections.abc import Iterable, Iterator

from stepdistill.report import rules
from stepdistill.report.diagnosis import destroyed_student, error_of_difference, still_falling
from stepdistill.report.entries import Entry, entries_of, equal_passes
from stepdistill.report.proposals import Advice, Proposal, accepted, scaled, setting
from stepdistill.report.read import Run, RungLog
from stepdistill.report.rules import MORE

_FAR = 1.5  # times the floor: from here on a distance is worth more training
_CERTAIN = 2.0  # standard errors: a smaller difference may be chance
_MUCH_MORE = 4.0  # times the current updates or images; four times the images halve the error of a mean
_RECIPE_NODES = 4
_ONE_STEP_START_TIMESTEP = 499  # the value measured on the letters data set: eval/recipe_notes.md


def advice_for(run: Run) -> list[Advice]:
    """Advice from every rule that the run's numbers trigger. Students that were destroyed come first, then distances."""
    students = {e.steps: e for e in entries_of([run]) if e.kind == "student"}
    reference = next((e for e in entries_of([run]) if e.is_reference), None)
    all_advice = [a for rung in run.rungs for phase in rung.phases for a in rules.destroyed(phase, rung, run)]
    all_advice += [*_worse_than_undistilled(run, students), *_far_from_teacher(run, students)]
    all_advice += _within_error(run, students)
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        if student is not None:
            all_advice += [
                *rules.looks(student, rung, run),
                *rules.prompts(students, rung, reference, run),
                *rules.diversity(students, rung, run),
            ]
        for phase in rung.phases:
            all_advice += rules.discriminator(phase, rung, run)
    return list(_merged(accepted(advice, run.config) for advice in [*all_advice, *rules.scales(run)]))


def _merged(all_advice: Iterable[Advice]) -> Iterator[Advice]:
    """Merges advice with the same remedy into one entry, with the findings and settings of all its rungs."""
    alike: dict[tuple[str, ...], list[Advice]] = {}
    for advice in all_advice:
        texts = tuple(proposal.text for proposal in advice.proposals)
        alike.setdefault(texts or (advice.finding,), []).append(advice)
    for group in alike.values():
        findings = "; ".join(advice.finding.removesuffix(".") for advice in group)
        proposals = []
        for same in zip(*(advice.proposals for advice in group), strict=True):
            changes = {key: value for proposal in same for key, value in proposal.changes.items()}
            proposals.append(Proposal(same[0].text, changes))
        yield Advice(f"{findings}.", tuple(proposals))


def _worse_than_undistilled(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """Rungs that are worse than the undistilled base model with as many network passes: they have hardly been trained."""
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        teacher = equal_passes(student, entries_of([run])) if student is not None else None
        if student is None or teacher is None:
            continue
        student_fid, bare = student.value("fid_to_teacher"), teacher.value("fid_to_teacher")
        if student_fid is not None and bare is not None and student_fid > bare:
            yield Advice(
                f"{rung.title}: FID to teacher {student_fid:.2f}, worse than {teacher.name}'s {bare:.2f} without any LoRA.",
                (_much_more_training(run, rung),),
            )


def _much_more_training(run: Run, rung: RungLog) -> Proposal:
    phase = rung.main_phase
    if destroyed_student(phase) is not None:
        return rules.lower_rate(phase, run)
    return Proposal(
        f"Training was too short, or did harm: before anything else, give the {phase.objective} phase many more updates.",
        scaled(run.config, _MUCH_MORE, f"{phase.key}.max_train_steps"),
    )


def _far_from_teacher(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """The rung whose FID rises the most over the rung before, if it is far above the floor and the rise is not chance."""
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
        lost, error = fid - before, error_of_difference(run, student.name, name)
        certain = error is None or lost > _CERTAIN * error
        if lost > 0 and certain and fid > _FAR * floor and (worst is None or lost > worst[0]):
            worst = (lost, rung, fid, before)
        before, name = fid, student.name
    if worst is None:
        return
    _, rung, fid, before = worst
    was = "" if rung is run.rungs[0] else f", {before:.2f} at the rung before"
    yield Advice(
        f"{rung.title}: FID to teacher {fid:.2f}{was}; floor (the teacher with other seeds): {floor:.2f}.",
        (_more_training(run, rung), *(() if destroyed_student(rung.main_phase) else _other_nodes(run, rung))),
    )


def _more_training(run: Run, rung: RungLog) -> Proposal:
    phase = rung.main_phase
    updates, rate = f"{phase.key}.max_train_steps", f"{phase.key}.learning_rate"
    falling = still_falling(phase)
    if destroyed_student(phase) is not None:
        return rules.lower_rate(phase, run)
    if falling is None:
        return Proposal(
            "Give the rung more updates, or a higher learning rate.", scaled(run.config, MORE, updates, rate)
        )
    if falling:
        return Proposal(
            "The loss was still falling when the phase ended: give the phase more updates.",
            scaled(run.config, MORE, updates),
        )
    return Proposal(
        "The loss had stopped falling: try a higher learning rate, then a higher LoRA rank.",
        scaled(run.config, MORE, rate, "lora.rank"),
    )


def _other_nodes(run: Run, rung: RungLog) -> Iterator[Proposal]:
    """Other training timesteps for a 2- or 1-step rung: an earlier start_timestep for one step of epsilon prediction, else
    node_steps=4. Nothing if the config already sets one of the two."""
    start_timestep = setting(run.config, f"{rung.key}.start_timestep")
    if rung.student_steps > 2 or rung.node_steps is not None or start_timestep is not None:
        return
    if rung.student_steps == 1 and (rung.record or {}).get("prediction_type") == "epsilon":
        yield Proposal(
            f"Start at timestep {_ONE_STEP_START_TIMESTEP}: given pure noise there, an error in the predicted epsilon "
            f"changes the image far less.",
            {f"{rung.key}.start_timestep": _ONE_STEP_START_TIMESTEP},
        )
    else:
        yield Proposal(
            "Train at the timesteps of 4 steps, as SDXL-Lightning does for its 2- and 1-step students.",
            {f"{rung.key}.node_steps": _RECIPE_NODES},
        )


def _within_error(run: Run, students: dict[int, Entry]) -> Iterator[Advice]:
    """Neighbouring rungs whose FIDs to the teacher differ by less than two standard errors of the difference
    (`error_of_difference`)."""
    pairs = []
    for first, second in itertools.pairwise(students.values()):
        a, b = first.value("fid_to_teacher"), second.value("fid_to_teacher")
        error = error_of_difference(run, first.name, second.name)
        if a is not None and b is not None and error is not None and abs(a - b) < _CERTAIN * error:
            pairs.append(
                f"{first.name} and {second.name} ({a:.2f} and {b:.2f}, the difference ± {error:.2f})"
            )
    if pairs:
        yield Advice(
            f"FID to teacher: the order of {', of '.join(pairs)} may be chance.",
            (
                Proposal(
                    "To find out which is better, evaluate on more images.",
                    scaled(run.config, _MUCH_MORE, "evaluation.num_images"),
                ),
            ),
        )
