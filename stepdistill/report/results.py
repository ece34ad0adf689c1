"""Reads evaluation/results.json for a report, and refuses a file that is not as `evaluate` wrote it. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed
from stepdistill.report.number_format import number

_STUDIES = ("diversity_grid", "scale_sweep", "matrix")
_OBJECTS = ("floor", "other_noise", "metrics", "protocol", "replicates", *_STUDIES)
_LISTS = ("prompts", "warnings", "unmeasured", "absent")


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results of a run; None if it is not evaluated yet, ValueError of one line if the file is damaged."""
    path = run_dir / "evaluation" / "results.json"
    if not path.exists():
        return None
    results = read_sealed(path)
    problem = next(_problems(results), None) if results is not None else "it was changed"
    if results is None or problem is not None:
        raise ValueError(
            f"{path} is not what `stepdistill evaluate` writes ({problem}); fix: run `stepdistill evaluate` again, which "
            f"keeps the images"
        )
    return results


def _problems(results: dict[str, Any]) -> Iterator[str]:
    """One sentence for each part whose structure is not as `evaluate` writes it."""
    rows = results.get("rows")
    if not isinstance(rows, list):
        yield "rows is not a list"
    yield from (f"{key} is not an object" for key in _OBJECTS if not isinstance(results.get(key) or {}, dict))
    yield from (f"{key} is not a list" for key in _LISTS if not isinstance(results.get(key) or [], list))
    if results.get("num_images") is not None and number(results["num_images"]) is None:
        yield "num_images is not a number"
    for row in rows or []:
        if isinstance(row, dict) and not isinstance(row.get("cost") or {}, dict):
            yield "cost of a row is not an object"
    for about in (results.get("metrics") or {}).values():
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            yield "metrics has an entry that is not an object of texts"
    for of_row in (results.get("replicates") or {}).values():
        if not isinstance(of_row, dict) or not all(map(_is_numbers, of_row.values())):
            yield "replicates has an entry that is not a list of numbers"
    if not all(isinstance(one, dict) for one in results.get("absent") or []):
        yield "absent has an entry that is not an object"
    yield from _study_problems(results)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _study_problems(results: dict[str, Any]) -> Iterator[str]:
    for key in _STUDIES:
        study = results.get(key) or {}
        for part in ("cells", "rows", "scales", "prompts"):
            if not isinstance(study.get(part) or [], list):
                yield f"{key}.{part} is not a list"
        if not all(isinstance(name, str) for name in study.get("rows") or []):
            yield f"{key}.rows has an entry that is not a name"
        for cell in study.get("cells") or []:
            if not isinstance(cell, dict) or any(isinstance(value, dict | list) for value in cell.values()):
                yield f"{key}.cells has an entry that is not an object of plain values"
