"""The report's plots with their alt texts: distances over steps and cost, losses and accuracies over updates."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepdistill.report.entries import Entry
from stepdistill.report.number_format import number
from stepdistill.report.plots import Boundary, Curve, Series, curve_plot, scatter_plot
from stepdistill.report.read import PhaseLog, Run, RungLog

_DISTANCES = ("fid_to_teacher", "fid_to_real")
_NEGLIGIBLE = 1e-6  # distances below this are the reference against itself


@dataclass(frozen=True)
class Plot:
    """An SVG as a data URI, its caption and its alt text."""

    uri: str
    caption: str
    alt: str


def distance_plots(entries: Sequence[Entry]) -> list[Plot]:
    """FID to the teacher and to real images, each over steps and over seconds per image."""
    plots = []
    for key in _DISTANCES:
        title = "FID to the teacher" if key == "fid_to_teacher" else "FID to real images"
        # a floor is drawn only if all runs share it; different floors are in the table
        floors = {entry.run.floor.get(key) for entry in entries}
        floor = floors.pop() if len(floors) == 1 else None
        for x_key, x_label, over in (
            ("steps", "steps", "steps"),
            ("seconds_per_image", "seconds per image", "cost"),
        ):
            series = _series(entries, x_key, key)
            if sum(len(one.points) for one in series) > 1:
                svg = scatter_plot(
                    series, x_label=x_label, y_label=title, floor=floor, steps=x_key == "steps"
                )
                plots.append(
                    Plot(svg_uri(svg), f"{title} over {over}", _alt_text(title, x_label, series, floor))
                )
    return plots


def training_plots(runs: Sequence[Run]) -> list[tuple[str, list[Plot]]]:
    """Plots per rung, most steps first: the MSE, and if the rung has such phases, the adversarial losses, the
    discriminator's accuracy and the loss of the fake score."""
    steps = sorted({rung.student_steps for run in runs for rung in run.rungs}, reverse=True)
    sections = []
    for n in steps:
        rungs = [(run.name, rung) for run in runs for rung in run.rungs if rung.student_steps == n]
        drawn = (draw(rungs) for draw in (_losses, _adversarial, _accuracy, _fake_score))
        plots = [plot for plot in drawn if plot is not None]
        if plots:
            teachers = "/".join(str(t) for t in dict.fromkeys(rung.teacher_steps for _, rung in rungs))
            sections.append((f"{teachers} → {n} steps", plots))
    return sections


def svg_uri(svg: bytes) -> str:
    """The data URI of an SVG."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _series(entries: Sequence[Entry], x_key: str, y_key: str) -> list[Series]:
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    several = len({entry.run.name for entry in entries}) > 1
    for entry in entries:
        x, y = number(entry.row.get(x_key)), number(entry.row.get(y_key))
        if x and y and x > 0 and y > _NEGLIGIBLE:
            name = {"teacher": "undistilled teacher", "student": "students"}.get(entry.kind, entry.label)
            if entry.is_unguided:
                name = "undistilled, no guidance"
            if several and entry.kind != "lora" and entry.label != entry.name:
                name = f"{entry.run.name}: {name}"
            points.setdefault((name, entry.kind == "teacher"), []).append((float(x), float(y)))
    return [Series(name, tuple(values), is_teacher) for (name, is_teacher), values in points.items()]


def _alt_text(title: str, x_label: str, series: Sequence[Series], floor: float | None) -> str:
    parts = [
        f"{one.label}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in sorted(one.points, reverse=True))
        for one in series
    ]
    ending = "" if floor is None else f". The floor is {floor:.3g}"
    return f"{title} over {x_label}. " + "; ".join(parts) + ending + "."


def _losses(rungs: Sequence[tuple[str, RungLog]]) -> Plot | None:
    """MSE of the phases that compare with the teacher: mse and convert minimise it, adversarial ones whose real samples are
    the teacher's log it beside their own loss."""

    def lines(phase: PhaseLog) -> list[tuple[str, str, bool]]:
        name = "mse" if phase.has_critic else "student_loss"
        return [(name, "MSE", phase.has_critic)]

    return _plot(rungs, lines, title="MSE to the teacher's steps", y_label="MSE", log=True)


def _adversarial(rungs: Sequence[tuple[str, RungLog]]) -> Plot | None:
    def lines(phase: PhaseLog) -> list[tuple[str, str, bool]]:
        names = [(phase.adversarial_loss, "student", False), ("discriminator_loss", "discriminator", True)]
        return names if phase.is_adversarial else []

    return _plot(rungs, lines, title="Adversarial losses", y_label="loss", log=False)


def _fake_score(rungs: Sequence[tuple[str, RungLog]]) -> Plot | None:
    """Shows whether the fake score keeps up with the student. The student's own loss is the size of the difference of the
    two scores, which need not fall."""

    def lines(_phase: PhaseLog) -> list[tuple[str, str, bool]]:
        return [("fake_score_loss", "fake score", False)]

    return _plot(rungs, lines, title="Loss of the fake score", y_label="MSE of epsilon", log=True)


def _accuracy(rungs: Sequence[tuple[str, RungLog]]) -> Plot | None:
    def lines(phase: PhaseLog) -> list[tuple[str, str, bool]]:
        if not phase.is_adversarial:
            return []
        real, student = (f"discriminator_accuracy_{of}" for of in ("real", "student"))
        if phase.values(real) == phase.values(student):  # a relativistic loss judges pairs, so both are equal
            return [(real, "pairs", False)]
        return [(real, "real samples", False), (student, "student's samples", True)]

    return _plot(
        rungs, lines, title="Discriminator accuracy", y_label="share judged correctly", log=False, chance=0.5
    )


def _plot(
    rungs: Sequence[tuple[str, RungLog]],
    lines: Callable[[PhaseLog], list[tuple[str, str, bool]]],
    *,
    title: str,
    y_label: str,
    log: bool,
    chance: float | None = None,
) -> Plot | None:
    """One plot of a rung in one or several runs; None if no phase logged any of the values.

    lines: for a phase, the curves to draw, each as (key in log.jsonl, label, whether it is dashed).
    """
    curves: list[Curve] = []
    boundaries: list[Boundary] = []
    alt_texts: list[str] = []
    for place, (run_name, rung) in enumerate(rungs):
        first = 0
        for phase in rung.phases:
            series = [
                (
                    label,
                    dashed,
                    [v for v in phase.values(key) if v > 0 or not log],
                    phase.updates_per_value(key),
                )
                for key, label, dashed in lines(phase)
            ]
            series = [one for one in series if one[2]]
            if not series:
                continue
            if len(rungs) == 1:
                boundaries.append(Boundary(first, phase.objective))
            for order, (label, dashed, values, every) in enumerate(series):
                name = label if len(rungs) == 1 else run_name if log else f"{run_name}, {label}"
                used_labels = {curve.label for curve in curves}
                colour = place if len(rungs) > 1 else order
                name = "_" + name if name in used_labels else name
                curves.append(Curve(name, first, tuple(values), colour, dashed, every))
                where = f"{run_name}, " if len(rungs) > 1 else ""
                alt_texts.append(f"{where}{phase.objective}, {label}: {values[0]:.3g} to {values[-1]:.3g}")
            first += round(max(len(values) * every for _, _, values, every in series))
    if not curves:
        return None
    if log and any(curve.dashed for curve in curves):
        y_label += " (dashed: adversarial phases)"
    svg = curve_plot(curves, boundaries, y_label=y_label, log=log, chance=chance)
    steps = rungs[0][1].student_steps
    alt = f"{title} of the {steps}-step rung over its updates, first and last value: {'; '.join(alt_texts)}."
    return Plot(svg_uri(svg), title, alt)
