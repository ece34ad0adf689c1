"""Writes the report of a run, or a comparison of several: index.html, results.json, results.md, grid.png. No torch.

A run that is not evaluated yet gets index.html only; numbers and images need `stepdistill evaluate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import write_image, write_json, write_text
from stepdistill.disk.places import clear_half_written
from stepdistill.report.entries import Entry, entries_of
from stepdistill.report.gallery import comparison_sheet
from stepdistill.report.markdown import markdown, markdown_table
from stepdistill.report.page import render_page
from stepdistill.report.read import Run, read_run
from stepdistill.report.summary import joined_names

_FILES = ("index.html", "results.json", "results.md", "grid.png")
__all__ = ["build_report", "markdown", "markdown_table"]


def build_report(
    run_dirs: Path | Sequence[Path], output: Path | None = None, *, grid_columns: int = 10
) -> Path:
    """Writes the report and returns its folder: report/ in the run's folder, or comparison/ beside the first of several.

    Args:
        run_dirs: the run's folder, or several runs' folders.
        output: another folder to write to.
        grid_columns: number of prompts in the same-noise grid.
    ValueError if a folder is not a run, or has nothing to report yet.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = _named_apart([read_run(folder) for folder in folders])
    if output is not None:
        folder = output
    else:
        folder = folders[0] / "report" if len(folders) == 1 else folders[0].parent / "comparison"
    write_text(folder / "index.html", render_page(runs, columns=grid_columns))
    evaluated = [run for run in runs if run.results is not None]
    if evaluated:
        _write_numbers(folder, runs, evaluated, columns=grid_columns)
    clear_half_written(folder, names=_FILES)
    return folder


def _write_numbers(folder: Path, runs: Sequence[Run], evaluated: Sequence[Run], *, columns: int) -> None:
    every = {run.name: {**(run.results or {}), "environment": run.environment} for run in evaluated}
    entries = entries_of(evaluated)
    if len(runs) == 1:
        facts, title = every[runs[0].name], runs[0].name
        text = facts | {"rows": list(runs[0].rows)}
    else:
        facts, title = {"runs": every}, joined_names(evaluated)
        text = _joined(evaluated, entries)
    write_json(folder / "results.json", facts)
    data = [runs[0].data] if len(runs) == 1 and runs[0].data is not None else []
    write_text(folder / "results.md", markdown(title, text, data))
    sheet = comparison_sheet(entries, columns=columns)
    if sheet is not None:
        write_image(folder / "grid.png", sheet)


def _joined(evaluated: Sequence[Run], entries: Sequence[Entry]) -> dict[str, Any]:
    """The results of several runs as one results object, for the Markdown table."""
    metrics = {key: about for run in reversed(evaluated) for key, about in run.metrics.items()}
    rows = [entry.row | {"row": entry.label} for entry in entries]
    return {**(evaluated[0].results or {}), "metrics": metrics, "rows": rows}


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with distinct names: the folder's name, or parent/folder for all if two names are equal. ValueError if even
    those are equal."""
    if _differ(runs):
        return list(runs)
    longer = [run.renamed(f"{run.path.resolve().parent.name}/{run.name}") for run in runs]
    if not _differ(longer):
        raise ValueError(
            f"several runs are called {runs[0].name}: give each folder once; folders of one name need different parents"
        )
    return longer


def _differ(runs: Sequence[Run]) -> bool:
    return len({run.name for run in runs}) == len(runs)
