"""How each phase moved sharpness, contrast and colour, from the few pictures that were drawn at its end.

After phase k, of N pictures of the same noise:   drift_k = mean s_k / mean t - 1,   change_k = drift_k - drift_{k-1}
with s_k the student's values and t those of the undistilled teacher, from which the ladder begins: drift_0 = 0. Colour is a
distance in grey levels, its drift the mean. The error of a change is the jackknife's over the pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepdistill import jackknife
from stepdistill.report.number_format import percent
from stepdistill.report.read import PhaseLog, Run, RungLog
from stepdistill.report.table import Cell, Column, Line, Table

SHARPNESS, CONTRAST, COLOUR = "sharpness", "contrast", "colour"
LOOKS = (SHARPNESS, CONTRAST, COLOUR)
_CERTAIN = 2.0  # standard errors
_AGREES = 0.5  # of the table's drift: the few pictures must show as much of it
_MUCH = 1 / 3  # of the drift: what the phase that is named must have moved


@dataclass(frozen=True)
class Change:
    """What a phase changed in a look, a share of the teacher's or grey levels; its standard error; the drift after it."""

    look: str
    rung: RungLog
    place: int
    by: float
    error: float
    drift: float

    @property
    def phase(self) -> PhaseLog:
        """The phase."""
        return self.rung.phases[self.place]

    @property
    def is_certain(self) -> bool:
        """Whether it is more than chance."""
        return abs(self.by) > _CERTAIN * self.error

    def __str__(self) -> str:
        return f"{self.rung.title}, phase {self.place}, {self.phase.objective}: {self.said}"

    @property
    def said(self) -> str:
        """Such as "-12 % ± 2 %"."""
        return f"{amount(self.look, self.by, sign=True)} ± {amount(self.look, self.error)}"


def amount(look: str, value: float, *, sign: bool = False) -> str:
    """A drift or a change as text."""
    before = "+" if sign and value > 0 else ""
    return before + (f"{value:.1f}" if look == COLOUR else percent(value))


def changes(run: Run, rung: RungLog, look: str) -> list[Change]:
    """What each phase changed, from the ladder's first to the last of `rung`; none where any of them left no numbers, or
    numbers of other pictures."""
    upto = run.rungs[: run.rungs.index(rung) + 1]
    places = [(one, place) for one in upto for place in range(len(one.phases))]
    measured = [looks for one, place in places if (looks := one.phases[place].looks) is not None]
    if len(measured) < len(places) or any(
        m["compared_with"] != measured[0]["compared_with"] for m in measured
    ):
        return []
    teacher = measured[0]["per_image"]["teacher"][look]
    before, moves = teacher, []
    for (one, place), looks in zip(places, measured, strict=True):
        after = looks["per_image"]["student"][look]
        by, error = _change(look, before, after, teacher)
        moves.append(Change(look, one, place, by, error, _drift(look, after, teacher)))
        before = after
    return moves


def mover(run: Run, rung: RungLog, look: str, drift: float) -> Change | None:
    """The phase that moved a look the most towards the drift that the table has for a rung; None where its few pictures do
    not show that drift, or no phase moved much of it."""
    moves = changes(run, rung, look)
    if not moves or moves[-1].drift / drift < _AGREES:
        return None
    most = max(moves, key=lambda change: change.by / drift)
    return most if most.is_certain and most.by / moves[-1].drift > _MUCH else None


def data_drift(phase: PhaseLog, look: str) -> float | None:
    """Of the data's own pictures of the same captions, against the teacher's."""
    if phase.looks is None:
        return None
    of_data, of_teacher = (phase.looks["per_image"][whose][look] for whose in ("data", "teacher"))
    return _drift(look, of_data, of_teacher)


def looks_table(run: Run) -> Table | None:
    """Drift after each phase and what the phase changed; None where no phase left numbers."""
    lines = list(_lines(run))
    if not lines:
        return None
    about = next(p.looks for rung in run.rungs for p in rung.phases if p.looks is not None)["compared_with"]
    caption = (
        f"{about['images']} pictures at the end of each phase, against the undistilled teacher's of the same noise and "
        f"captions at {about['teacher_steps']} steps; in small what the phase itself changed, ± its standard error."
    )
    columns = (
        Column(SHARPNESS, about="Below 0 is blur."),
        Column(CONTRAST, about="Of brightness."),
        Column(COLOUR, about="Distance of the mean colour, in grey levels."),
    )
    return Table(caption, columns, tuple(lines))


def _lines(run: Run) -> Iterator[Line]:
    last: PhaseLog | None = None
    for rung in run.rungs:
        moves = {look: {c.place: c for c in changes(run, rung, look) if c.rung is rung} for look in LOOKS}
        for place, phase in enumerate(rung.phases):
            if phase.looks is None:
                continue
            last = phase
            yield Line(
                f"{rung.title}, phase {place} ({phase.objective})",
                "student",
                tuple(_cell(phase, look, moves[look].get(place)) for look in LOOKS),
            )
    if last is not None:
        cells = ((look, data_drift(last, look)) for look in LOOKS)
        yield Line(
            "the data themselves", "data", tuple(Cell(amount(k, v or 0.0, sign=True)) for k, v in cells)
        )


def _cell(phase: PhaseLog, look: str, change: Change | None) -> Cell:
    assert phase.looks is not None
    per_image = phase.looks["per_image"]
    drift = _drift(look, per_image["student"][look], per_image["teacher"][look])
    return Cell(amount(look, drift, sign=True), "" if change is None else change.said)


def _change(
    look: str, before: Sequence[float], after: Sequence[float], teacher: Sequence[float]
) -> tuple[float, float]:
    """(change, its standard error)."""

    def without(index: int | None) -> float:
        rows = [k for k in range(len(teacher)) if k != index]
        b, a, t = ([values[k] for k in rows] for values in (before, after, teacher))
        return _drift(look, a, t) - _drift(look, b, t)

    return without(None), jackknife.standard_error([without(k) for k in range(len(teacher))])


def _drift(look: str, values: Sequence[float], teacher: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return mean if look == COLOUR else mean / (sum(teacher) / len(teacher)) - 1
