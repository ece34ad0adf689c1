"""evaluation/results.json as a report reads it: refused where it is not what `evaluate` wrote. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed
from stepdistill.report.number_format import number

_STUDIES = ("diversity_grid", "scale_sweep", "matrix")
_OBJECTS = ("floor", "other_noise", "metrics", "protocol", "replicates", *_STUDIES)
_LISTS = ("prompts", "warnings", "unmeasured", "absent")


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results of a run; None where it is not evaluated yet, ValueError in one line where the file is damaged."""
    path = run_dir / "evaluation" / "results.json"
    if not path.exists():
        return None
    results = read_sealed(path)
    wrong = next(_wrong(results), None) if results is not None else "it was changed"
    if results is None or wrong is not None:
        raise ValueError(
            f"{path} is not what `stepdistill evaluate` writes ({wrong}): mend: run it again, which draws no picture anew"
        )
    return results


def _wrong(results: dict[str, Any]) -> Iterator[str]:
    """What is of another shape than `evaluate` gives it, in words."""
    rows = results.get("rows")
    if not isinstance(rows, list):
        yield "rows is no list"
    yield from (f"{key} is no object" for key in _OBJECTS if not isinstance(results.get(key) or {}, dict))
    yield from (f"{key} is no list" for key in _LISTS if not isinstance(results.get(key) or [], list))
    if results.get("num_images") is not None and number(results["num_images"]) is None:
        yield "num_images is no number"
    for row in rows or []:
        if isinstance(row, dict) and not isinstance(row.get("cost") or {}, dict):
            yield "cost of a row is no object"
    for about in (results.get("metrics") or {}).values():
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            yield "metrics holds one without title and format"
    for of_row in (results.get("replicates") or {}).values():
        if not isinstance(of_row, dict) or not all(map(_is_numbers, of_row.values())):
            yield "replicates holds what is no list of numbers"
    if not all(isinstance(one, dict) for one in results.get("absent") or []):
        yield "absent holds what is no object"
    yield from _wrong_studies(results)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _wrong_studies(results: dict[str, Any]) -> Iterator[str]:
    for key in _STUDIES:
        study = results.get(key) or {}
        for part in ("cells", "rows", "scales", "prompts"):
            if not isinstance(study.get(part) or [], list):
                yield f"{key}.{part} is no list"
        if not all(isinstance(name, str) for name in study.get("rows") or []):
            yield f"{key}.rows holds what is no name"
        for cell in study.get("cells") or []:
            if not isinstance(cell, dict) or any(isinstance(value, dict | list) for value in cell.values()):
                yield f"{key}.cells holds what is no cell"
