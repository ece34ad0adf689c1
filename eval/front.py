"""The trade between both distances as a picture: FID to real over FID to teacher, a panel per step count.

    python eval/front.py eval/results/front.json --line mse-alone half-the-adversary default [--title default="before" ...]

reads what eval/ablations.py wrote and draws FILE.svg beside it. The variants of --line, which differ in one key, are joined
by a line; the others are points. --title gives a variant another name in the picture. Bars are standard deviations of the
differences from the default over the seeds, because a seed shifts all variants alike. The star is the teacher at its most
steps.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from side_by_side import STEPS, step_count

from stepdistill.disk.durable import read_json

MEASURES = ("fid_to_teacher", "fid_to_real")
COLOURS = ("#b8460e", "#0f766e", "#7c3aed", "#a1266b", "#6b5d00", "#27548a", "#444444")
MARKERS = ("^", "D", "v", "P", "X", "p", "h")
Rows = Mapping[str, Mapping[str, Any]]


def point(tables: Sequence[Rows], name: str, steps: int) -> list[tuple[float, float]]:
    """(mean, deviation of the difference from the default) of FID to teacher and FID to real over the seeds."""
    found = []
    for measure in MEASURES:
        values = [table[f"{name}-{steps}"][measure] for table in tables]
        differences = [v - t[f"default-{steps}"][measure] for v, t in zip(values, tables, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        found.append((statistics.fmean(values), spread))
    return found


def draw_panel(
    axes: Axes,
    tables: Sequence[Rows],
    line: Sequence[str],
    others: Sequence[str],
    steps: int,
    titles: Mapping[str, str],
) -> None:
    """Draws one step count."""
    on_line = [point(tables, name, steps) for name in line]
    xs, ys = ([p[axis][0] for p in on_line] for axis in (0, 1))
    widths, heights = ([p[axis][1] for p in on_line] for axis in (0, 1))
    label = " – ".join(titles.get(name, name) for name in line)
    axes.errorbar(xs, ys, xerr=widths, yerr=heights, color="#0b5394", marker="o", linewidth=1.6, label=label)
    for name, colour, marker in zip(others, COLOURS, MARKERS, strict=False):
        (x, width), (y, height) = point(tables, name, steps)
        label = titles.get(name, name)
        axes.errorbar([x], [y], xerr=[width], yerr=[height], color=colour, marker=marker, label=label, ls="")
    teacher = next(name for name in tables[0] if name.startswith("teacher-"))
    x, y = (statistics.fmean(table[teacher][measure] for table in tables) for measure in MEASURES)
    axes.plot([x], [y], "*", color="#333333", markersize=9, label=teacher)
    axes.set_title(step_count(steps))
    axes.grid(color="#e6e6e6", linewidth=0.6)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws FID to real over FID to teacher of variants.")
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("--line", nargs="+", required=True, metavar="NAME", help="variants along one key")
    parser.add_argument("--title", action="append", default=[], metavar="NAME=TITLE", help="in the picture")
    args = parser.parse_args(argv)
    titles = dict(title.split("=", 1) for title in args.title)
    tables: list[Rows] = read_json(args.results)["tables"]
    last = f"-{STEPS[-1]}"
    drawn = [name.removesuffix(last) for name in tables[0] if name.endswith(last)]
    others = [n for n in drawn if n not in args.line and all(f"{n}-{k}" in tables[0] for k in STEPS)]
    others = [name for name in others if name != "teacher"]
    matplotlib.rcParams.update({"svg.hashsalt": "stepdistill", "font.size": 8})
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for axes, steps in zip(figure.subplots(2, 2).flat, STEPS, strict=True):
        draw_panel(axes, tables, args.line, others, steps, titles)
    figure.supxlabel("FID to teacher: lower keeps the teacher's look")
    figure.supylabel("FID to real: lower is nearer to real images")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(args.results.with_suffix(".svg"), metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
