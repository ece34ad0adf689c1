"""Tables of numbers for the page.

Each metric in results.json has a title, a format, and which values are better: "lower", "higher", "one", "zero", or "" for
neither. A metric `*_std` is shown as ± behind the metric that it belongs to.
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
"""Metrics that compare images of equal noise one by one; they are 0 for the teacher itself."""
_BADNESS: dict[str, Callable[[float], float]] = {
    "lower": lambda value: value,
    "higher": lambda value: -value,
    "one": lambda value: abs(value - 1),
    "zero": abs,
}


@dataclass(frozen=True)
class Column:
    """A column's heading: title, an arrow and its meaning in words, and one sentence about the metric."""

    title: str
    arrow: str = ""
    meaning: str = ""
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """A number as text; `extra` follows it in small print, and `best` numbers are highlighted."""

    text: str
    extra: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row: its label, its kind (teacher, student, lora, floor, data) and its cells."""

    label: str
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table for the page's number_table macro."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: tuple[Line, ...] = ()


def metrics_of(entries: Iterable[Entry]) -> dict[str, dict[str, str]]:
    """The metrics that at least one row has, of all runs, in table order."""
    all_entries = list(entries)
    metrics: dict[str, dict[str, str]] = {}
    for entry in all_entries:
        metrics |= {key: about for key, about in entry.run.metrics.items() if key not in metrics}
    return {
        key: about for key, about in metrics.items() if any(e.value(key) is not None for e in all_entries)
    }


def quality_table(entries: Sequence[Entry], floors: Mapping[str, Mapping[str, float]]) -> Table:
    """Rows x metrics; the last rows are `floors` by label: the floor, and the teacher with other noise."""
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
    columns = (Column("network passes"), *(_column(key, about) for key, about in shown.items()))
    caption = _caption(entries, {key for floor in floors.values() for key in floor})
    return Table(caption, columns, lines, foot)


def cost_table(entries: Sequence[Entry]) -> Table | None:
    """The cost of an image in seconds and memory; None if nothing was timed."""
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
        ("images / s at best batch", "images_per_second", ".4g"),
        ("peak memory at best batch, MiB", "peak_memory_mib", ",.0f"),
    ):
        columns.append((Column(title), [format_number(cost.get(key), spec) for cost in costs]))
    shown_columns = [(column, texts) for column, texts in columns if any(text != MISSING for text in texts)]
    if not shown_columns:
        return None
    passes = (Column("network passes"), [f"{entry.row['nfe']:g}" for entry in entries])
    lines = tuple(
        Line(entry.label, entry.kind, tuple(Cell(texts[place]) for _, texts in [passes, *shown_columns]))
        for place, entry in enumerate(entries)
    )
    caption = "A step is one network pass, or two with guidance. s / image: at the best batch, one row timed after another."
    return Table(caption, tuple(column for column, _ in [passes, *shown_columns]), lines)


def best_entries(entries: Sequence[Entry], key: str, about: Mapping[str, str]) -> set[str]:
    """Labels of the best rows in a metric: the best of each step count that several distilled rows share; if no rows share a
    step count, the best of all distilled rows with few steps. Empty if neither direction is better."""
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
    """The caption: what is highlighted, and what the floor and other-noise rows mean for the metrics that have them."""
    steps = [entry.steps for entry in entries if entry.kind != "teacher"]
    shared = len(set(steps)) < len(steps)
    best = (
        "among rows with equal step counts"
        if shared
        else f"among the distilled rows with {FEW_STEPS} steps or fewer"
    )
    with_floor = set(floors)
    sets = {
        "_to_real": "two sets of real images",
        "_to_teacher": "two sets of the teacher's images with different seeds",
    }
    pairs_of_sets = [
        text
        for ending, text in sets.items()
        if any(key.endswith(ending) and key not in PAIRED for key in with_floor)
    ]
    floor = (
        f" Floor: the distance, at this number of images, between {' and between '.join(pairs_of_sets)}."
        if pairs_of_sets
        else ""
    )
    if with_floor & PAIRED:
        floor += (
            " Other noise: the teacher compared image by image with itself at other seeds; paired metrics are this large if "
            "nothing of the map from noise to image is preserved."
        )
    return f"Bold and underlined: the best {best}.{floor}"


def _base(key: str) -> str:
    """The metric that a `*_std` belongs to; "" for any other metric."""
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
