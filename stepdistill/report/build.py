"""The report of a run, or a comparison of several: index.html, results.json, results.md, grid.png. No torch.

A run that is still training has a page alone; numbers and pictures come with `stepdistill evaluate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import write_json, write_picture, write_text
from stepdistill.disk.places import clear_half_written
from stepdistill.report.entries import Entry, entries_of
from stepdistill.report.gallery import comparison_sheet
from stepdistill.report.markdown import markdown, markdown_table
from stepdistill.report.page import render
from stepdistill.report.read import Run, read_run
from stepdistill.report.summary import joined_names

_FILES = ("index.html", "results.json", "results.md", "grid.png")
__all__ = ["build_report", "markdown", "markdown_table"]


def build_report(
    run_dirs: Path | Sequence[Path], output: Path | None = None, *, grid_columns: int = 10
) -> Path:
    """Writes the report of a run to report/ in its folder, of several to comparison/ beside them; returns the folder.

    Args:
        run_dirs: the run's folder, or several.
        output: another folder to write to.
        grid_columns: prompts in the same-noise grid.
    ValueError where a folder is no run, or has nothing to report yet.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = _named_apart([read_run(folder) for folder in folders])
    if output is not None:
        folder = output
    else:
        folder = folders[0] / "report" if len(folders) == 1 else folders[0].parent / "comparison"
    write_text(folder / "index.html", render(runs, columns=grid_columns))
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
        write_picture(folder / "grid.png", sheet)


def _joined(evaluated: Sequence[Run], entries: Sequence[Entry]) -> dict[str, Any]:
    """Several runs as if they were one, for the Markdown table."""
    metrics = {key: about for run in reversed(evaluated) for key, about in run.metrics.items()}
    rows = [entry.row | {"row": entry.label} for entry in entries]
    return {**(evaluated[0].results or {}), "metrics": metrics, "rows": rows}


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs under names that differ: their folder's, with the folder above where two are called the same."""
    if _differ(runs):
        return list(runs)
    longer = [run.renamed(f"{run.path.resolve().parent.name}/{run.name}") for run in runs]
    if not _differ(longer):
        raise ValueError(
            f"several runs are called {runs[0].name}: give each folder once, under names that differ"
        )
    return longer


def _differ(runs: Sequence[Run]) -> bool:
    return len({run.name for run in runs}) == len(runs)
