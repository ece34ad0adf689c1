"""How each phase changed sharpness, contrast and colour, measured on a few images drawn at the end of the phase.

drift_k  = mean(s_k) / mean(t) - 1     after phase k, over N images drawn from the same noise
change_k = drift_k - drift_{k-1}       what phase k itself changed
s_k  the student's values after phase k        t  the undistilled teacher's values; the ladder starts from it: drift_0 = 0

Colour is a distance in grey levels, and its drift is the mean distance. The standard error of a change is a jackknife over
the images.
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
_AGREES = 0.5  # the few images must show at least this share of the table's drift
_MUCH = 1 / 3  # a phase is named only if it caused more than this share of the drift


@dataclass(frozen=True)
class Change:
    """How much a phase changed one look (`by`: a share of the teacher's value, for colour grey levels), the standard error
    of that change, and the drift after the phase. `place` is the phase's index in the rung."""

    look: str
    rung: RungLog
    place: int
    by: float
    error: float
    drift: float

    @property
    def phase(self) -> PhaseLog:
        """The phase that made the change."""
        return self.rung.phases[self.place]

    @property
    def is_certain(self) -> bool:
        """Whether the change is larger than two standard errors."""
        return abs(self.by) > _CERTAIN * self.error

    def __str__(self) -> str:
        return f"{self.rung.title}, phase {self.place}, {self.phase.objective}: {self.by_text}"

    @property
    def by_text(self) -> str:
        """The change with its standard error, such as "-12 % ± 2 %"."""
        return f"{amount(self.look, self.by, sign=True)} ± {amount(self.look, self.error)}"


def amount(look: str, value: float, *, sign: bool = False) -> str:
    """A drift or a change as text: percent, or grey levels for colour."""
    before = "+" if sign and value > 0 else ""
    return before + (f"{value:.1f}" if look == COLOUR else percent(value))


def changes(run: Run, rung: RungLog, look: str) -> list[Change]:
    """What each phase changed, from the ladder's first phase to the last phase of `rung`. Empty if any of these phases was
    not measured, or was measured on other images than the first."""
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
    """The largest change by a phase in the direction of `drift`, the rung's drift in the table. None if the few images do
    not show that drift, or no phase caused much of it."""
    moves = changes(run, rung, look)
    if not moves or moves[-1].drift / drift < _AGREES:
        return None
    most = max(moves, key=lambda change: change.by / drift)
    return most if most.is_certain and most.by / moves[-1].drift > _MUCH else None


def data_drift(phase: PhaseLog, look: str) -> float | None:
    """Drift of the training images from the teacher's images of the same captions; None if the phase was not measured."""
    if phase.looks is None:
        return None
    data, teacher = (phase.looks["per_image"][source][look] for source in ("data", "teacher"))
    return _drift(look, data, teacher)


def looks_table(run: Run) -> Table | None:
    """The page's table: drift after each phase, and what the phase changed. None if no phase was measured."""
    lines = list(_lines(run))
    if not lines:
        return None
    about = next(p.looks for rung in run.rungs for p in rung.phases if p.looks is not None)["compared_with"]
    caption = (
        f"{about['images']} images at the end of each phase, compared with the undistilled teacher's of the same noise "
        f"and captions at {about['teacher_steps']} steps. Small print: what the phase itself changed, ± standard error."
    )
    columns = (
        Column(SHARPNESS, about="Below 0: blurred."),
        Column(CONTRAST, about="Spread of brightness."),
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
        yield Line("training images", "data", tuple(Cell(amount(k, v or 0.0, sign=True)) for k, v in cells))


def _cell(phase: PhaseLog, look: str, change: Change | None) -> Cell:
    assert phase.looks is not None
    per_image = phase.looks["per_image"]
    drift = _drift(look, per_image["student"][look], per_image["teacher"][look])
    return Cell(amount(look, drift, sign=True), "" if change is None else change.by_text)


def _change(
    look: str, before: Sequence[float], after: Sequence[float], teacher: Sequence[float]
) -> tuple[float, float]:
    """(change, standard error of the change)."""

    def without(index: int | None) -> float:
        rows = [k for k in range(len(teacher)) if k != index]
        b, a, t = ([values[k] for k in rows] for values in (before, after, teacher))
        return _drift(look, a, t) - _drift(look, b, t)

    return without(None), jackknife.standard_error([without(k) for k in range(len(teacher))])


def _drift(look: str, values: Sequence[float], teacher: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return mean if look == COLOUR else mean / (sum(teacher) / len(teacher)) - 1
