"""What one rung's numbers call for: rules over a row of the table, a phase's log, the sweep of LoRA scales.

A rule looks at one thing and says what was found, what to do, and which settings do it. Thresholds are here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.report.entries import FEW_STEPS, Entry
from stepdistill.report.proposals import Advice, Proposal, scaled, setting
from stepdistill.report.quantities import format_number, number, percent
from stepdistill.report.read import ADVERSARIAL, PhaseLog, Run, RungLog
from stepdistill.report.signs import adversary

_BLUR, _HARSH, _CONTRAST = -0.1, 0.25, 0.15
_ACCURACY_LOST, _CLIP_LOST = 0.03, 1.0
_DIVERSITY = 0.8
_SCALE_GAIN = 0.95
MORE, LESS = 2.0, 0.5  # times today's updates or rate
_MORE_GUIDANCE = 1.25


def looks(student: Entry, rung: RungLog, run: Run) -> Iterator[Advice]:
    """Blur, harshness and contrast against the teacher."""
    sharpness, contrast = student.value("sharpness_drift"), student.value("contrast_drift")
    adversarial = [phase for phase in rung.phases if phase.objective in ADVERSARIAL]
    more = [rung.main_phase] if rung.student_steps > FEW_STEPS else adversarial
    if sharpness is not None and sharpness < _BLUR:
        finding = f"{rung.title}: {percent(-sharpness)} less sharp than the teacher."
        keys = [f"{phase.key}.max_train_steps" for phase in more]
        proposal = Proposal("Give these phases more updates.", scaled(run.config, MORE, *keys))
        yield Advice(finding, (proposal,) if more else ())
    if sharpness is not None and sharpness > _HARSH and adversarial:
        yield Advice(
            f"{rung.title}: {percent(sharpness)} sharper than the teacher.",
            (Proposal("The adversary overdoes it.", _gentler(run, adversarial)),),
        )
    if contrast is not None and abs(contrast) > _CONTRAST:
        yield Advice(
            f"{rung.title}: contrast {'+' if contrast > 0 else ''}{percent(contrast)} against the teacher."
        )


def prompts(
    students: Mapping[int, Entry], rung: RungLog, reference: Entry | None, run: Run
) -> Iterator[Advice]:
    """Pictures that show less of what was asked than the reference does, and the rung where that begins."""
    for key, lost, title in (
        ("prompt_accuracy", _ACCURACY_LOST, "prompts read right"),
        ("clip_score", _CLIP_LOST, "CLIP score"),
    ):
        said = percent if key == "prompt_accuracy" else _two_digits
        own = students[rung.student_steps].value(key)
        teachers = reference.value(key) if reference is not None else None
        if own is None or teachers is None or own >= teachers - lost:
            continue
        begins = _first_below(students, run, key, teachers - lost) or rung
        changes = scaled(run.config, MORE, f"{begins.main_phase.key}.max_train_steps")
        text = f"It begins at {begins.title}: give that rung more updates."
        if begins is run.rungs[0]:
            text = f"It begins at {begins.title}: give that rung more updates, or raise the guidance that it learns."
            changes |= scaled(run.config, _MORE_GUIDANCE, "teacher.guidance_scale")
        yield Advice(
            f"{rung.title}: {title} {said(own)}, the teacher's {said(teachers)}.", (Proposal(text, changes),)
        )


def diversity(students: Mapping[int, Entry], rung: RungLog, run: Run) -> Iterator[Advice]:
    """Seeds that look too much alike, and the rung where that begins."""
    share = students[rung.student_steps].value("diversity")
    if share is None or share >= _DIVERSITY:
        return
    finding = f"{rung.title}: its seeds differ {share:.2f} times as much as the teacher's."
    begins = _first_below(students, run, "diversity", _DIVERSITY) or rung
    adversarial = [phase for phase in begins.phases if phase.objective in ADVERSARIAL]
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
                towards = [phase for phase in rung.phases if phase.objective not in ADVERSARIAL]
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
