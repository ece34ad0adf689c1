"""Plots as SVG; equal numbers give equal bytes. The only file of the report that imports matplotlib.

Series differ in colour, marker and dash together. Text is drawn as paths, so the viewer needs no font.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "stepdistill",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#333333",
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#595959",
    "ytick.color": "#595959",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.2,
}
_SIZE = (4.8, 3.1)
_COLOURS = ("#0b5394", "#b8460e", "#0f766e", "#7c3aed", "#a1266b", "#6b5d00", "#27548a", "#444444")
_MARKERS = ("o", "^", "D", "v", "P", "X", "p", "h")
_TEACHER = "#6e6e6e"


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one kind of row; the teacher is drawn in dashed grey."""

    label: str
    points: tuple[tuple[float, float], ...]
    is_teacher: bool = False


@dataclass(frozen=True)
class Curve:
    """One logged number over updates: drawn faint as logged, and bold smoothed.

    `first` is the update at which the curve begins, `every` the updates from one value to the next; a label that starts with
    _ is left out of the legend.
    """

    label: str
    first: int
    values: tuple[float, ...]
    colour: int
    dashed: bool = False
    every: float = 1.0


@dataclass(frozen=True)
class Boundary:
    """The update at which a phase begins, and the phase's label."""

    at: int
    label: str


def scatter_plot(
    series: Sequence[Series], *, x_label: str, y_label: str, floor: float | None, steps: bool
) -> bytes:
    """Distances over steps (`steps`: every step count is a tick) or over seconds, as SVG; both axes logarithmic."""
    with _axes() as (figure, axes):
        axes.set_xscale("log", base=2 if steps else 10)
        axes.set_yscale("log")
        place = 0
        for one in series:
            xs, ys = zip(*sorted(one.points), strict=True)
            if one.is_teacher:
                axes.plot(xs, ys, label=one.label, color=_TEACHER, marker="s", linestyle="--", markersize=4.5)
                continue
            colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
            axes.plot(xs, ys, label=one.label, color=colour, marker=marker, markersize=5, linewidth=1.6)
            place += 1
        if floor is not None:
            axes.axhline(floor, color="#6e6e6e", linewidth=1, linestyle=":", label=f"floor {floor:.3g}")
        if steps:
            axes.set_xticks(sorted({x for one in series for x, _ in one.points}))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        else:
            _log_ticks(axes, "x")
        _log_ticks(axes, "y")
        axes.grid(True, which="major")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend()
        return _svg(figure)


def curve_plot(
    curves: Sequence[Curve],
    boundaries: Sequence[Boundary],
    *,
    y_label: str,
    log: bool,
    chance: float | None = None,
) -> bytes:
    """Curves over the updates of a rung, as SVG; vertical lines separate the phases, whose names are above."""
    with _axes() as (figure, axes):
        for curve in curves:
            colour, dash = _COLOURS[curve.colour % len(_COLOURS)], "--" if curve.dashed else "-"
            xs, ys = _thinned(curve)
            axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(xs, _smoothed(ys), dash, color=colour, linewidth=1.6, label=curve.label)
        if chance is not None:
            axes.axhline(chance, color="#333333", linewidth=0.9, linestyle=":", label="chance")
            axes.set_ylim(-0.02, 1.02)
        for boundary in boundaries:
            if boundary.at:
                axes.axvline(boundary.at - 0.5, color="#b5b5b5", linewidth=0.8)
            axes.annotate(
                boundary.label,
                (boundary.at, 1.01),
                xycoords=("data", "axes fraction"),
                xytext=(2, 0),
                textcoords="offset points",
                fontsize=7,
                color="#595959",
            )
        if log:
            axes.set_yscale("log")
            _log_ticks(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, axis="y", which="major")
        axes.set_xlabel("update")
        axes.set_ylabel(y_label)
        if chance is not None or sum(not curve.label.startswith("_") for curve in curves) > 1:
            axes.legend()
        return _svg(figure)


@contextmanager
def _axes() -> Iterator[tuple[Figure, Axes]]:
    """A figure in the report's style, independent of the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=_SIZE, layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _log_ticks(axes: Axes, which: str) -> None:
    """Ticks at 1, 2, 5 of each decade if the axis spans less than three decades, else at the decades only."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _thinned(curve: Curve, most: int = 300) -> tuple[list[float], list[float]]:
    """(x, y) of at most `most` points; each is the mean over an equal number of updates."""
    width = -(-len(curve.values) // most)
    chunks = [curve.values[i : i + width] for i in range(0, len(curve.values), width)]
    middles = [i * width + (len(chunk) - 1) / 2 for i, chunk in enumerate(chunks)]
    xs = [curve.first + curve.every * (middle + 1) - 1 for middle in middles]
    return xs, [sum(chunk) / len(chunk) for chunk in chunks]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over a fifteenth of the curve."""
    reach = len(values) // 30
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
