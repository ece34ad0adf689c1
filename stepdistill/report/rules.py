"""What one rung's numbers call for: rules over a row of the table, a phase's log, the sweep of LoRA scales.

A rule looks at one thing and says what was found, what to do, and which settings do it. Thresholds are here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.report.diagnosis import adversary, still_falling
from stepdistill.report.entries import Entry
from stepdistill.report.looks_by_phase import (
    COLOUR,
    CONTRAST,
    SHARPNESS,
    Change,
    amount,
    changes,
    data_drift,
    mover,
)
from stepdistill.report.number_format import format_number, number, percent
from stepdistill.report.proposals import Advice, Proposal, scaled, setting
from stepdistill.report.read import PhaseLog, Run, RungLog

_BLUR, _HARSH, _CONTRAST = -0.1, 0.25, 0.15
_COLOUR = 8.0  # grey levels
_TOWARDS_DATA = 0.5  # of what a phase changed: how far the data must drift the same way
_ACCURACY_LOST, _CLIP_LOST = 0.03, 1.0
_DIVERSITY = 0.8
_SCALE_GAIN = 0.95
MORE, LESS = 2.0, 0.5  # times today's updates or rate
_MORE_GUIDANCE = 1.25


def looks(student: Entry, rung: RungLog, run: Run) -> Iterator[Advice]:
    """Blur, harshness, contrast and colour against the teacher; the phase that brought it, and what helps against that."""
    for look, is_bad, text in (
        (SHARPNESS, lambda drift: drift < _BLUR, "less sharp than the teacher"),
        (SHARPNESS, lambda drift: drift > _HARSH, "sharper than the teacher"),
        (CONTRAST, lambda drift: drift < -_CONTRAST, "less contrast than the teacher"),
        (CONTRAST, lambda drift: drift > _CONTRAST, "more contrast than the teacher"),
        (COLOUR, lambda drift: drift > _COLOUR, "grey levels from the teacher's colours"),
    ):
        drift = student.value(f"{look}_drift")
        if drift is None or not is_bad(drift):
            continue
        moved = mover(run, rung, look, drift)
        by_phase = f" ({moved})" if moved is not None else ""
        yield Advice(
            f"{rung.title}: {amount(look, abs(drift))} {text}{by_phase}.",
            tuple(_against(moved, rung, run)) if moved is not None else (),
        )


def _against(moved: Change, rung: RungLog, run: Run) -> Iterator[Proposal]:
    """What the numbers at hand support against the change that a phase made; nothing where they support nothing."""
    phase = moved.phase
    if phase.is_adversarial:
        yield Proposal(_why(moved, run), _gentler(run, [phase]))
    elif still_falling(phase):
        updates = scaled(run.config, MORE, f"{phase.key}.max_train_steps")
        yield Proposal("The loss of that phase was still falling at its end: give it more updates.", updates)
    elif moved.look == SHARPNESS and moved.by < 0:
        yield from _won_back(rung, run)


def _why(moved: Change, run: Run) -> str:
    text = "give that adversarial phase fewer updates or a lower learning rate."
    drift = data_drift(moved.phase, moved.look)
    takes_data = setting(run.config, f"{moved.phase.key}.discriminator.real") == "data"
    is_direction = moved.look != COLOUR  # a distance says nothing of the way
    if not (takes_data and is_direction) or drift is None or drift / moved.by < _TOWARDS_DATA:
        return text[0].upper() + text[1:]
    return f"It leads to the data, which drift the same way from the teacher: to stay nearer to the teacher, {text}"


def _won_back(rung: RungLog, run: Run) -> Iterator[Proposal]:
    """More of the adversarial phases that won sharpness in this run: on this rung, or, where it has none, as on another."""
    moves = changes(run, run.rungs[-1], SHARPNESS) or changes(run, rung, SHARPNESS)
    won = [c for c in moves if c.phase.is_adversarial and c.by > 0 and c.is_certain]
    here = [c.phase for c in won if c.rung is rung]
    if here:
        keys = [f"{phase.key}.max_train_steps" for phase in here]
        text = "The adversarial phase of this rung won sharpness back: give it more updates."
        yield Proposal(text, scaled(run.config, MORE, *keys))
    elif won and not any(phase.is_adversarial for phase in rung.phases):
        most = max(won, key=lambda change: change.by)
        another = setting(run.config, most.phase.key)
        another = another | {
            "teacher_steps": None,
            "discriminator": another["discriminator"] | {"start": "fresh"},
        }
        phases = [*setting(run.config, f"{rung.key}.phases"), another]
        text = (
            f"The adversarial phase at {most.rung.title} won sharpness ({most.said}): give this rung one too."
        )
        yield Proposal(text, {f"{rung.key}.phases": phases})


def prompts(
    students: Mapping[int, Entry], rung: RungLog, reference: Entry | None, run: Run
) -> Iterator[Advice]:
    """Pictures that show less of what was asked than the reference does, and the rung where that begins."""
    for key, lost, title in (
        ("prompt_accuracy", _ACCURACY_LOST, "prompts read right"),
        ("clip_score", _CLIP_LOST, "CLIP score"),
    ):
        said = percent if key == "prompt_accuracy" else _two_digits
        student_value = students[rung.student_steps].value(key)
        teachers = reference.value(key) if reference is not None else None
        if student_value is None or teachers is None or student_value >= teachers - lost:
            continue
        begins = _first_below(students, run, key, teachers - lost) or rung
        changes = scaled(run.config, MORE, f"{begins.main_phase.key}.max_train_steps")
        text = f"It begins at {begins.title}: give that rung more updates."
        if begins is run.rungs[0]:
            text = f"It begins at {begins.title}: give that rung more updates, or raise the guidance that it learns."
            changes |= scaled(run.config, _MORE_GUIDANCE, "teacher.guidance_scale")
        yield Advice(
            f"{rung.title}: {title} {said(student_value)}, the teacher's {said(teachers)}.",
            (Proposal(text, changes),),
        )


def diversity(students: Mapping[int, Entry], rung: RungLog, run: Run) -> Iterator[Advice]:
    """Seeds that look too much alike, and the rung where that begins."""
    share = students[rung.student_steps].value("diversity")
    if share is None or share >= _DIVERSITY:
        return
    finding = f"{rung.title}: its seeds differ {share:.2f} times as much as the teacher's."
    begins = _first_below(students, run, "diversity", _DIVERSITY) or rung
    adversarial = [phase for phase in begins.phases if phase.is_adversarial]
    text = f"It begins at {begins.title}: compare the seeds below"
    if adversarial:
        text += ", and lower the learning rate or the updates of that rung's adversarial phases"
    yield Advice(finding, (Proposal(f"{text}.", _gentler(run, adversarial)),))


def discriminator(phase: PhaseLog, rung: RungLog, run: Run) -> Iterator[Advice]:
    """A discriminator that teaches nothing, or is too far ahead."""
    seen = adversary(phase)
    if seen is None:
        return
    where, key = f"{rung.title}, {phase.objective}", f"{phase.key}.discriminator"

    def rated(factor: float) -> dict[str, Any]:
        changes = scaled(run.config, factor, f"{key}.learning_rate")
        if not changes:  # it has the phase's
            of_phase = scaled(run.config, factor, f"{phase.key}.learning_rate")
            changes = {f"{key}.learning_rate": rate for rate in of_phase.values()}
        return changes

    def switched(option: str, value: str, text: str) -> Iterator[Proposal]:
        if setting(run.config, f"{key}.{option}") != value:
            yield Proposal(text, {f"{key}.{option}": value})

    if seen.at_chance:
        yield Advice(
            f"{where}: the discriminator tells {percent(seen.accuracy)} right for the whole phase; 50 % is chance.",
            (
                Proposal("It teaches nothing: raise its learning rate.", rated(MORE)),
                *switched("loss", "relativistic", "If that is not enough: the relativistic loss."),
                *switched("heads", "multi", "If that is not enough: heads at several depths."),
            ),
        )
    else:
        yield Advice(
            f"{where}: the discriminator tells {percent(seen.accuracy)} right at the end, and the student's loss rose.",
            (
                Proposal("It is too far ahead: lower its learning rate.", rated(LESS)),
                *switched("trunk", "frozen", "If that is not enough: freeze its trunk."),
            ),
        )


def scales(run: Run) -> Iterator[Advice]:
    """Rungs whose LoRA is nearer to the teacher at another weight than the one it was trained at."""
    cells: list[dict[str, Any]] = (run.part("scale_sweep") or {}).get("cells") or []
    for rung in run.rungs:
        name = f"student-{rung.student_steps}"
        distances = _numbers(
            {c.get("scale"): c.get("latent_mse_to_teacher") for c in cells if c.get("row") == name}
        )
        if not distances or not distances.get(1):
            continue
        best = min(distances.items(), key=lambda item: item[1])[0]
        if best != 1 and distances[best] < _SCALE_GAIN * distances[1]:
            finding = (
                f"{rung.title}: nearer to the teacher at LoRA scale {best:g} ({distances[best]:.4f}) "
                f"than at 1 ({distances[1]:.4f})."
            )
            if best < 1:
                changes = scaled(run.config, LESS, f"{rung.phases[-1].key}.learning_rate")
                yield Advice(finding, (Proposal("It overshoots: lower the learning rate.", changes),))
            else:
                towards = [phase for phase in rung.phases if not phase.is_adversarial]
                changes = scaled(run.config, MORE, f"{(towards or rung.phases)[-1].key}.max_train_steps")
                yield Advice(finding, (Proposal("It has not got there yet: give it more updates.", changes),))


def _gentler(run: Run, phases: list[PhaseLog]) -> dict[str, Any]:
    """Half the learning rate and half the updates of some phases."""
    keys = [f"{phase.key}.{key}" for phase in phases for key in ("learning_rate", "max_train_steps")]
    return scaled(run.config, LESS, *keys)


def _first_below(students: Mapping[int, Entry], run: Run, key: str, least: float) -> RungLog | None:
    """The first rung of the ladder whose number is below `least`."""
    for rung in run.rungs:
        student = students.get(rung.student_steps)
        value = student.value(key) if student is not None else None
        if value is not None and value < least:
            return rung
    return None


def _two_digits(value: float) -> str:
    return format_number(value, ".2f")


def _numbers(values: dict[Any, Any]) -> dict[float, float]:
    pairs = {number(key): number(value) for key, value in values.items()}
    return {key: value for key, value in pairs.items() if key is not None and value is not None}
