"""Takes over rows of a comparison that earlier calls measured with the same settings, such as other seeds.

OUTPUT.json of a call has the rows of every seed and method. A later call uses these rows if its settings and the method's
learning-rate factor are the same. It trains and measures what no file has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import STEPS, Table

from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_json

SETTINGS = ("config", "size", "budget", "num_images", "overrides")


@dataclass(frozen=True)
class SeedResults:
    """The results of one seed in one file.

    rows    all rows by name, including the teacher's
    floor   distance between two sets of real images, and between two sets of the teacher's images
    costs   training cost of each method
    source  the file, and the commit that wrote it
    """

    rows: Mapping[str, dict[str, Any]]
    floor: dict[str, Any] | None
    costs: Mapping[str, dict[str, float]]
    source: dict[str, str]


def rows_of(method: str, rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of one method at all its step counts, by name."""
    names = [f"{method}-{n}" for n in STEPS]
    return {name: rows[name] for name in names if name in rows}


def read_earlier(
    files: Sequence[Path], settings: Mapping[str, Any], rates: Mapping[str, float]
) -> dict[tuple[int, str], SeedResults]:
    """Results by (seed, method); if several files have them, those of the first file. Results of a method with another
    learning-rate factor than in `rates` are left out.

    Raises ConfigError if a file is not the result of a comparison, or if its settings differ from `settings`.
    """
    earlier: dict[tuple[int, str], SeedResults] = {}
    for file in files:
        payload = read_json(file)
        if payload is None or not {"seeds", "tables", "floors", "costs", "rates", "commit"} <= payload.keys():
            raise ConfigError(f"--earlier: got {file}; allowed: the OUTPUT.json of a comparison")
        for name in SETTINGS:
            if payload.get(name) != settings[name]:
                raise ConfigError(
                    f"--earlier: got {file}, whose {name} is {payload.get(name)}; allowed: {settings[name]}, as in this call"
                )
        source = {"file": file.name, "commit": payload["commit"]}
        columns = zip(payload["seeds"], payload["tables"], payload["floors"], payload["costs"], strict=True)
        for seed, rows, floor, costs in columns:
            results = SeedResults(rows, floor, costs, source)
            for method in costs:
                if payload["rates"].get(method, 1.0) == rates.get(method, 1.0):
                    earlier.setdefault((seed, method), results)
    return earlier


def joined(local: Table | None, earlier: Mapping[str, SeedResults]) -> Table:
    """One seed's table: the rows of `local`, and those of each method in `earlier`.

    The teacher's rows and the floor are those of `local`, or of the first file if `local` is None.
    """
    first = next(iter(earlier.values()), None)
    if local is None:
        assert first is not None, "a seed has rows from here or from a file"
        methods = {name for method in first.costs for name in rows_of(method, first.rows)}
        local = Table({k: row for k, row in first.rows.items() if k not in methods}, first.floor, None)
    rows = dict(local.rows)
    for method, results in earlier.items():
        rows |= rows_of(method, results.rows)
    return Table(rows, local.floor, local.run_dir, local.replicates)
