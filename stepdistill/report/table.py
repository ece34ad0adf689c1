"""Tables of numbers for the page.

A metric says of itself: title, format, and which way is better ("lower", "higher", "one", "zero" or "" for neither). A
`*_std` stands behind the number that it belongs to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.report.entries import FEW_STEPS, Entry
from stepdistill.report.number_format import MISSING, format_number

_DIRECTIONS = {
    "lower": ("↓", "lower is better"),
    "higher": ("↑", "higher is better"),
    "one": ("→ 1", "1 is best"),
    "zero": ("→ 0", "0 is best"),
}
PAIRED = frozenset({"paired_fid_to_teacher", "latent_mse_to_teacher", "colour_drift"})
"""Measures at equal noise, 0 for the teacher itself."""
_BADNESS: dict[str, Callable[[float], float]] = {
    "lower": lambda value: value,
    "higher": lambda value: -value,
    "one": lambda value: abs(value - 1),
    "zero": abs,
}


@dataclass(frozen=True)
class Column:
    """A column's heading: title, an arrow and its meaning, one sentence."""

    title: str
    arrow: str = ""
    meaning: str = ""
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """A number as text; `extra` follows it in small, `best` marks it."""

    text: str
    extra: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row: its label, what it is (teacher, student, lora, floor) and its cells."""

    label: str
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """What the page's table macro shows."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: tuple[Line, ...] = ()


def metrics_of(entries: Iterable[Entry]) -> dict[str, dict[str, str]]:
    """The metrics of all runs that any row has, in table order."""
    all_entries = list(entries)
    metrics: dict[str, dict[str, str]] = {}
    for entry in all_entries:
        metrics |= {key: about for key, about in entry.run.metrics.items() if key not in metrics}
    return {
        key: about for key, about in metrics.items() if any(e.value(key) is not None for e in all_entries)
    }


def quality_table(entries: Sequence[Entry], floors: Mapping[str, Mapping[str, float]]) -> Table:
    """Rows x metrics, the yardsticks last: floors, and the teacher with other noise; `floors` by label."""
    metrics = metrics_of(entries)
    shown = {key: about for key, about in metrics.items() if _base(key) not in metrics}
    best = {key: best_entries(entries, key, about) for key, about in shown.items()}
    lines = tuple(
        Line(
            entry.label,
            entry.kind,
            (
                Cell(f"{entry.row['nfe']:g}"),
                *(_cell(entry, k, metrics, entry.label in best[k]) for k in shown),
            ),
        )
        for entry in entries
    )
    foot = tuple(
        Line(label, "floor", (Cell(""), *(_floor_cell(floor.get(key), shown[key]) for key in shown)))
        for label, floor in floors.items()
        if any(key in floor for key in shown)
    )
    columns = (Column("U-Net passes"), *(_column(key, about) for key, about in shown.items()))
    caption = _caption(entries, {key for floor in floors.values() for key in floor})
    return Table(caption, columns, lines, foot)


def cost_table(entries: Sequence[Entry]) -> Table | None:
    """What an image costs; None where nothing was timed."""
    costs = [entry.row.get("cost") or {} for entry in entries]
    smallest = next((cost["smallest_batch"] for cost in costs if cost.get("smallest_batch")), 1)
    drawn = [format_number(entry.row.get("seconds_per_image"), ".4g") for entry in entries]
    faster = [format_number(entry.row.get("speed_up"), ".1f") for entry in entries]
    columns = [
        (Column("s / image"), drawn),
        (Column("speed-up"), [f"{text} x" if text != MISSING else text for text in faster]),
    ]
    for title, key, spec in (
        (f"s at batch {smallest}", f"seconds_at_batch_{smallest}", ".4g"),
        ("best batch", "best_batch", "g"),
        ("images / s there", "images_per_second", ".4g"),
        ("peak memory there, MiB", "peak_memory_mib", ",.0f"),
    ):
        columns.append((Column(title), [format_number(cost.get(key), spec) for cost in costs]))
    shown_columns = [(column, texts) for column, texts in columns if any(text != MISSING for text in texts)]
    if not shown_columns:
        return None
    passes = (Column("U-Net passes"), [f"{entry.row['nfe']:g}" for entry in entries])
    lines = tuple(
        Line(entry.label, entry.kind, tuple(Cell(texts[place]) for _, texts in [passes, *shown_columns]))
        for place, entry in enumerate(entries)
    )
    caption = "A step is one U-Net pass, or two with guidance on. Seconds per image: at the best batch, row after row."
    return Table(caption, tuple(column for column, _ in [passes, *shown_columns]), lines)


def best_entries(entries: Sequence[Entry], key: str, about: Mapping[str, str]) -> set[str]:
    """Labels of the best few-step rows: of each step count where several rows share one, else of all of them."""
    badness = _BADNESS.get(about.get("better", ""))
    if badness is None:
        return set()
    winners: set[str] = set()
    for group in _groups(entries):
        values = {e.label: value for e in group if (value := e.value(key)) is not None}
        texts = {label: format_number(value, about.get("format", "g")) for label, value in values.items()}
        if len(set(texts.values())) > 1:
            first = min(values.items(), key=lambda item: badness(item[1]))[0]
            winners |= {label for label, text in texts.items() if text == texts[first]}
    return winners


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    distilled = [entry for entry in entries if entry.kind != "teacher"]
    by_steps = [[e for e in distilled if e.steps == n] for n in sorted({e.steps for e in distilled})]
    shared = [group for group in by_steps if len(group) > 1]
    return shared or [[e for e in distilled if e.steps <= FEW_STEPS]]


def _caption(entries: Sequence[Entry], floors: Iterable[str]) -> str:
    """What is marked, and what the floor is of the metrics that have one."""
    steps = [entry.steps for entry in entries if entry.kind != "teacher"]
    shared = len(set(steps)) < len(steps)
    best = (
        "where several rows share a step count"
        if shared
        else f"of the distilled rows with {FEW_STEPS} steps or fewer"
    )
    with_floor = set(floors)
    sets = {
        "_to_real": "real images are from other real ones",
        "_to_teacher": "the teacher is from its own images of other seeds",
    }
    apart = [
        text
        for ending, text in sets.items()
        if any(key.endswith(ending) and key not in PAIRED for key in with_floor)
    ]
    floor = f" Floor: at this number of images, how far {' and '.join(apart)}." if apart else ""
    if with_floor & PAIRED:
        floor += (
            " Other noise: the teacher with other seeds, image by image against itself; so large are paired measures where "
            "nothing of the map from noise to image is kept."
        )
    return f"Bold and underlined: the best {best}.{floor}"


def _base(key: str) -> str:
    """The metric that a `*_std` belongs to; no metric's name for another."""
    return key.removesuffix("_std") if key.endswith("_std") else ""


def _column(key: str, about: Mapping[str, str]) -> Column:
    arrow, meaning = _DIRECTIONS.get(about.get("better", ""), ("", ""))
    return Column(about.get("title", key), arrow, meaning, about.get("about", ""))


def _cell(entry: Entry, key: str, metrics: Mapping[str, Mapping[str, str]], best: bool) -> Cell:
    spec = metrics[key].get("format", "g")
    std = entry.value(f"{key}_std")
    extra = (
        "" if std is None else f"± {format_number(std, metrics.get(f'{key}_std', {}).get('format', spec))}"
    )
    return Cell(format_number(entry.row.get(key), spec), extra, best)


def _floor_cell(value: Any, about: Mapping[str, str]) -> Cell:
    return Cell("" if value is None else format_number(value, about.get("format", "g")))
