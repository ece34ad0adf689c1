"""What one rung's numbers call for: rules over a row of the table, a phase's log, the sweep of LoRA scales.

A rule looks at one thing and says what was found, what to do, and which keys of the config do it. Thresholds are here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepdistill.report.entries import FEW_STEPS, Entry
from stepdistill.report.quantities import format_number, number, percent
from stepdistill.report.read import ADVERSARIAL, PhaseLog, Run, RungLog
from stepdistill.report.signs import adversary

_BLUR, _HARSH, _CONTRAST = -0.1, 0.25, 0.15
_ACCURACY_LOST, _CLIP_LOST = 0.03, 1.0
_DIVERSITY = 0.8
_SCALE_GAIN = 0.95


@dataclass(frozen=True)
class Advice:
    """What was found, what to do, and the keys of the config that do it."""

    finding: str
    remedy: str
    keys: tuple[str, ...]


def looks(student: Entry, rung: RungLog) -> Iterator[Advice]:
    """Blur, harshness and contrast against the teacher."""
    sharpness, contrast = student.value("sharpness_drift"), student.value("contrast_drift")
    adversarial = [phase for phase in rung.phases if phase.objective in ADVERSARIAL]
    if sharpness is not None and sharpness < _BLUR:
        finding = f"{rung.title}: {percent(-sharpness)} less sharp than the teacher."
        if rung.student_steps > FEW_STEPS:
            keys: tuple[str, ...] = (f"{rung.main_phase.key}.max_train_steps",)
            yield Advice(finding, "At this many steps it is too little training: give it more updates.", keys)
        elif adversarial:
            keys = tuple(f"{phase.key}.max_train_steps" for phase in adversarial)
            yield Advice(finding, "MSE blurs at few steps: give the adversarial phases more updates.", keys)
        else:
            yield Advice(
                finding,
                "MSE blurs at few steps: add an adversarial phase (paired, then single) after it.",
                (f"{rung.key}.phases",),
            )
    if sharpness is not None and sharpness > _HARSH and adversarial:
        yield Advice(
            f"{rung.title}: {percent(sharpness)} sharper than the teacher.",
            "The adversary overdoes it: lower the learning rate of those phases, or give them fewer updates.",
            tuple(
                f"{phase.key}.{key}" for phase in adversarial for key in ("learning_rate", "max_train_steps")
            ),
        )
    if contrast is not None and abs(contrast) > _CONTRAST:
        yield Advice(
            f"{rung.title}: contrast {'+' if contrast > 0 else ''}{percent(contrast)} against the teacher.",
            "Guidance is learned on the first rung: compare its row first, then change the guidance or its updates.",
            ("teacher.guidance_scale", "ladder.0.phases.0.max_train_steps"),
        )


def prompts(student: Entry, rung: RungLog, reference: Entry | None) -> Iterator[Advice]:
    """Pictures that show less of what was asked than the reference does."""
    for key, lost, title in (
        ("prompt_accuracy", _ACCURACY_LOST, "prompts read right"),
        ("clip_score", _CLIP_LOST, "CLIP score"),
    ):
        said = percent if key == "prompt_accuracy" else _two_digits
        own, teachers = student.value(key), reference.value(key) if reference is not None else None
        if own is not None and teachers is not None and own < teachers - lost:
            yield Advice(
                f"{rung.title}: {title} {said(own)}, the teacher's {said(teachers)}.",
                "Give the rung more updates; where the first rung is low already, raise the guidance it learns.",
                (f"{rung.main_phase.key}.max_train_steps", "teacher.guidance_scale"),
            )


def diversity(student: Entry, rung: RungLog) -> Iterator[Advice]:
    """Seeds that look too much alike."""
    diversity = student.value("diversity")
    if diversity is not None and diversity < _DIVERSITY:
        adversarial = [phase for phase in rung.phases if phase.objective in ADVERSARIAL] or [rung.main_phase]
        yield Advice(
            f"{rung.title}: its seeds differ {diversity:.2f} times as much as the teacher's.",
            "The student draws the same again: lower the learning rate or the updates of the phase that took it away, "
            "and compare the seeds below.",
            tuple(
                f"{phase.key}.{key}" for phase in adversarial for key in ("learning_rate", "max_train_steps")
            ),
        )


def discriminator(phase: PhaseLog, rung: RungLog) -> Iterator[Advice]:
    """A discriminator that teaches nothing, or is too far ahead."""
    found, where, key = (
        adversary(phase),
        f"{rung.title}, {phase.objective}",
        f"{phase.key}.discriminator",
    )
    if found is None:
        return
    if found.at_chance:
        yield Advice(
            f"{where}: the discriminator tells {percent(found.accuracy)} right for the whole phase; 50 % is chance.",
            "It teaches nothing: raise its learning rate, then give it heads at several depths or the relativistic loss.",
            (f"{key}.learning_rate", f"{key}.heads", f"{key}.loss"),
        )
    else:
        yield Advice(
            f"{where}: the discriminator tells {percent(found.accuracy)} right at the end, and the student's loss rose.",
            "It is too far ahead: lower its learning rate, or freeze its trunk.",
            (f"{key}.learning_rate", f"{key}.trunk"),
        )


def scales(run: Run) -> Iterator[Advice]:
    """Rungs whose LoRA is nearer to the teacher at another weight than the one it was trained at."""
    cells: list[dict[str, Any]] = (run.part("scale_sweep") or {}).get("cells") or []
    for rung in run.rungs:
        name = f"student-{rung.student_steps}"
        known = _numbers(
            {c.get("scale"): c.get("latent_mse_to_teacher") for c in cells if c.get("row") == name}
        )
        if not known or not known.get(1):
            continue
        best = min(known.items(), key=lambda item: item[1])[0]
        if best != 1 and known[best] < _SCALE_GAIN * known[1]:
            finding = (
                f"{rung.title}: nearer to the teacher at LoRA scale {best:g} ({known[best]:.4f}) "
                f"than at 1 ({known[1]:.4f})."
            )
            last = rung.phases[-1].key
            if best < 1:
                remedy = "It overshoots: lower the learning rate, or average the weights."
                yield Advice(finding, remedy, (f"{last}.learning_rate", "training.ema_decay"))
            else:
                remedy = "It has not got there yet: give it more updates."
                yield Advice(finding, remedy, (f"{last}.max_train_steps",))


def _two_digits(value: float) -> str:
    return format_number(value, ".2f")


def _numbers(values: dict[Any, Any]) -> dict[float, float]:
    found = {number(key): number(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if key is not None and value is not None}
