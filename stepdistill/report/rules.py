"""Rules about one rung: its row of the table, the logs of its phases, and the sweep of LoRA scales.

Each rule checks one thing and yields the finding, what to do, and the settings for it. The thresholds are below.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.report.diagnosis import adversary, destroyed_student, still_falling
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
_TOWARDS_DATA = 0.5  # the data must drift in the same direction by at least this share of the phase's change
_ACCURACY_LOST, _CLIP_LOST = 0.03, 1.0
_DIVERSITY = 0.8
_SCALE_GAIN = 0.95
MORE, LESS, MUCH_LESS = 2.0, 0.5, 0.1  # times the current updates or learning rate
_MORE_GUIDANCE = 1.25


def destroyed(phase: PhaseLog, rung: RungLog, run: Run) -> Iterator[Advice]:
    """A student whose loss ended far above where it began: nothing but a lower learning rate helps."""
    means = destroyed_student(phase)
    if means is not None:
        yield Advice(
            f"{rung.title}, {phase.objective}: the loss began at {means[0]:.3g} and ended at {means[1]:.3g}.",
            (lower_rate(phase, run),),
        )


def lower_rate(phase: PhaseLog, run: Run) -> Proposal:
    """A much lower learning rate for a phase that destroyed its student."""
    return Proposal(
        "The learning rate destroys the student: before anything else, lower it.",
        scaled(run.config, MUCH_LESS, f"{phase.key}.learning_rate"),
    )


def looks(student: Entry, rung: RungLog, run: Run) -> Iterator[Advice]:
    """Blur, oversharpening, contrast and colour drift compared with the teacher, the phase that caused it, and a remedy."""
    for look, is_bad, text in (
        (SHARPNESS, lambda drift: drift < _BLUR, "less sharp than the teacher"),
        (SHARPNESS, lambda drift: drift > _HARSH, "sharper than the teacher"),
        (CONTRAST, lambda drift: drift < -_CONTRAST, "less contrast than the teacher"),
        (CONTRAST, lambda drift: drift > _CONTRAST, "more contrast than the teacher"),
        (COLOUR, lambda drift: drift > _COLOUR, "grey levels away from the teacher's colours"),
    ):
        drift = student.value(f"{look}_drift")
        if drift is None or not is_bad(drift):
            continue
        moved = mover(run, rung, look, drift)
        by_phase = f" (largest change in {moved})" if moved is not None else ""
        yield Advice(
            f"{rung.title}: {amount(look, abs(drift))} {text}{by_phase}.",
            tuple(_remedies(moved, rung, run)) if moved is not None else (),
        )


def _remedies(moved: Change, rung: RungLog, run: Run) -> Iterator[Proposal]:
    """Remedies against the change that a phase made, as far as this run's numbers support one; else none."""
    phase = moved.phase
    if destroyed_student(phase) is not None:
        yield lower_rate(phase, run)
    elif phase.is_adversarial:
        yield Proposal(_adversarial_text(moved, run), _gentler(run, [phase]))
    elif still_falling(phase):
        updates = scaled(run.config, MORE, f"{phase.key}.max_train_steps")
        yield Proposal(
            "The loss was still falling when that phase ended: give the phase more updates.", updates
        )
    elif moved.look == SHARPNESS and moved.by < 0:
        yield from _more_adversarial(rung, run)


def _adversarial_text(moved: Change, run: Run) -> str:
    """Advice against an adversarial phase's change; says so if the phase pulls the student towards the training images."""
    text = "give that adversarial phase fewer updates or a lower learning rate."
    drift = data_drift(moved.phase, moved.look)
    takes_data = setting(run.config, f"{moved.phase.key}.discriminator.real") == "data"
    is_direction = moved.look != COLOUR  # colour drift is a distance, which has no direction
    if not (takes_data and is_direction) or drift is None or drift / moved.by < _TOWARDS_DATA:
        return text[0].upper() + text[1:]
    return (
        f"That phase pulls the student's images towards the training images, which differ from the teacher in the same way. "
        f"To stay closer to the teacher, {text}"
    )


def _more_adversarial(rung: RungLog, run: Run) -> Iterator[Proposal]:
    """More training by adversarial phases that increased sharpness in this run: more updates for this rung's, or if the rung
    has none, a copy of the best one of another rung."""
    moves = changes(run, run.rungs[-1], SHARPNESS) or changes(run, rung, SHARPNESS)
    sharpened = [c for c in moves if c.phase.is_adversarial and c.by > 0 and c.is_certain]
    here = [c.phase for c in sharpened if c.rung is rung]
    if here:
        keys = [f"{phase.key}.max_train_steps" for phase in here]
        text = "The adversarial phase of this rung increases sharpness: give it more updates."
        yield Proposal(text, scaled(run.config, MORE, *keys))
    elif sharpened and not any(phase.is_adversarial for phase in rung.phases):
        best = max(sharpened, key=lambda change: change.by)
        copied = setting(run.config, best.phase.key)
        copied = copied | {
            "teacher_steps": None,
            "discriminator": copied["discriminator"] | {"start": "fresh"},
        }
        phases = [*setting(run.config, f"{rung.key}.phases"), copied]
        text = (
            f"The adversarial phase at {best.rung.title} increased sharpness ({best.by_text}): add the same phase to this "
            f"rung."
        )
        yield Proposal(text, {f"{rung.key}.phases": phases})


def prompts(
    students: Mapping[int, Entry], rung: RungLog, reference: Entry | None, run: Run
) -> Iterator[Advice]:
    """Images that follow their prompts less than the reference's do, and the first rung with that problem."""
    for key, lost, title in (
        ("prompt_accuracy", _ACCURACY_LOST, "prompt accuracy"),
        ("clip_score", _CLIP_LOST, "CLIP score"),
    ):
        as_text = percent if key == "prompt_accuracy" else _two_digits
        student_value = students[rung.student_steps].value(key)
        teacher_value = reference.value(key) if reference is not None else None
        if student_value is None or teacher_value is None or student_value >= teacher_value - lost:
            continue
        begins = _first_below(students, run, key, teacher_value - lost) or rung
        finding = f"{rung.title}: {title} {as_text(student_value)}, the teacher has {as_text(teacher_value)}."
        if destroyed_student(begins.main_phase) is not None:
            yield Advice(finding, (lower_rate(begins.main_phase, run),))
            continue
        settings = scaled(run.config, MORE, f"{begins.main_phase.key}.max_train_steps")
        text = f"The problem begins at {begins.title}: give that rung more updates."
        if begins is run.rungs[0]:
            text = f"The problem begins at {begins.title}: give that rung more updates, or raise teacher.guidance_scale."
            settings |= scaled(run.config, _MORE_GUIDANCE, "teacher.guidance_scale")
        yield Advice(finding, (Proposal(text, settings),))


def diversity(students: Mapping[int, Entry], rung: RungLog, run: Run) -> Iterator[Advice]:
    """Images of different seeds that look too much alike, and the first rung with that problem."""
    share = students[rung.student_steps].value("diversity")
    if share is None or share >= _DIVERSITY:
        return
    finding = f"{rung.title}: images of different seeds differ {share:.2f} times as much as the teacher's."
    begins = _first_below(students, run, "diversity", _DIVERSITY) or rung
    adversarial = [phase for phase in begins.phases if phase.is_adversarial]
    text = f"Diversity is first lost at {begins.title}: see 'Diversity over seeds' below"
    if adversarial:
        text += ", and give that rung's adversarial phases a lower learning rate or fewer updates"
    yield Advice(finding, (Proposal(f"{text}.", _gentler(run, adversarial)),))


def discriminator(phase: PhaseLog, rung: RungLog, run: Run) -> Iterator[Advice]:
    """A discriminator that is at chance, destroyed, or too strong."""
    key = f"{phase.key}.discriminator"
    problem = adversary(phase, loss=setting(run.config, f"{key}.loss"))
    if problem is None:
        return
    finding = f"{rung.title}, {phase.objective}: the discriminator's accuracy is {percent(problem.accuracy)}"
    if problem.state == "destroyed":
        finding += " in the last half of the phase (50 % is chance), and its loss or gradients show that it broke down."
        remedies = [
            Proposal(
                "Its learning rate destroys the discriminator: lower it.", _rated(run, phase, MUCH_LESS)
            ),
        ]
    elif problem.state == "at chance":
        finding += " throughout the phase; 50 % is chance."
        remedies = [
            Proposal(
                "The student learns nothing from it: raise the discriminator's learning rate.",
                _rated(run, phase, MORE),
            ),
            *_switched(run, f"{key}.loss", "relativistic", "use the relativistic loss."),
            *_switched(run, f"{key}.heads", "multi", "use discriminator heads at several depths."),
        ]
    else:
        finding += " at the end, and the student's loss rose."
        remedies = [
            Proposal("The discriminator is too strong: lower its learning rate.", _rated(run, phase, LESS)),
            *_switched(run, f"{key}.trunk", "frozen", "freeze its trunk."),
        ]
    yield Advice(finding, tuple(remedies))


def _rated(run: Run, phase: PhaseLog, factor: float) -> dict[str, Any]:
    """`factor` times the discriminator's learning rate; without one of its own it uses the phase's."""
    key = f"{phase.key}.discriminator.learning_rate"
    of_phase = scaled(run.config, factor, f"{phase.key}.learning_rate")
    return scaled(run.config, factor, key) or dict(zip([key], of_phase.values(), strict=False))


def _switched(run: Run, key: str, value: str, text: str) -> Iterator[Proposal]:
    """The proposal to set another value, unless the run has it."""
    if setting(run.config, key) != value:
        yield Proposal(f"If that is not enough, {text}", {key: value})


def scales(run: Run) -> Iterator[Advice]:
    """Rungs whose LoRA is closer to the teacher at another scale than 1, at which it was trained."""
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
                f"{rung.title}: closer to the teacher at LoRA scale {best:g} (latent MSE {distances[best]:.4f}) "
                f"than at scale 1 ({distances[1]:.4f})."
            )
            if best < 1:
                settings = scaled(run.config, LESS, f"{rung.phases[-1].key}.learning_rate")
                yield Advice(finding, (Proposal("The LoRA overshoots: lower the learning rate.", settings),))
            else:
                without_discriminator = [phase for phase in rung.phases if not phase.is_adversarial]
                phase = (without_discriminator or rung.phases)[-1]
                if destroyed_student(phase) is not None:
                    yield Advice(finding, (lower_rate(phase, run),))
                    continue
                settings = scaled(run.config, MORE, f"{phase.key}.max_train_steps")
                yield Advice(
                    finding, (Proposal("The LoRA is undertrained: give it more updates.", settings),)
                )


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
