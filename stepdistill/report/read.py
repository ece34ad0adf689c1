"""What a run's folder holds for a report, read once. Files only; keys that an older version did not write may be missing.

config.yaml                  what was asked: ladder, updates
environment.json             on what
cache/manifest.json          how many samples it learned from, and which were left out
log.jsonl                    every update
rungs/<steps>/               finished rungs, their previews, and how pictures looked at each phase's end
evaluation/results.json      rows of numbers; the pictures beside it are read where they are shown
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepdistill.config.saved import saved_config
from stepdistill.disk.durable import read_sealed, warn_of_damage
from stepdistill.messages import sizes_text
from stepdistill.report.number_format import number, steps_text
from stepdistill.report.results import read_results
from stepdistill.run.log import read_log
from stepdistill.run.rungs import RECORD_NAME, rung_folder

ADVERSARIAL = ("paired", "single")  # objectives with a discriminator
_LOOKS = ("sharpness", "contrast", "colour")
_BEFORE = (
    "measured by an earlier version, whose distances to the teacher are at equal noise: `stepdistill evaluate` measures "
    "them against the teacher's images of other seeds"
)


@dataclass(frozen=True)
class PhaseLog:
    """One phase of a rung: what the config asks for, and its lines of log.jsonl in order."""

    key: str
    objective: str
    max_train_steps: int
    records: tuple[dict[str, Any], ...]
    looks: dict[str, Any] | None = None
    """Sharpness, contrast and colour of a few pictures at its end (training/measure_looks.py)."""

    @property
    def is_adversarial(self) -> bool:
        """Whether it has a discriminator."""
        return not set(self.objective.split("+")).isdisjoint(ADVERSARIAL)

    @property
    def updates(self) -> int:
        """Updates done so far."""
        return max((int(record.get("step", -1)) + 1 for record in self.records), default=0)

    def values(self, name: str) -> list[float]:
        """What the log says under `name`, in order; what is no finite number is left out."""
        numbers = (number(record.get(name)) for record in self.records)
        return [float(value) for value in numbers if value is not None]


@dataclass(frozen=True)
class RungLog:
    """One rung: its phases, and rung.json where it is finished."""

    key: str
    teacher_steps: int
    student_steps: int
    phases: tuple[PhaseLog, ...]
    record: dict[str, Any] | None
    previews: tuple[Path, ...]
    node_steps: int | None = None
    prediction_type: str | None = None

    @property
    def title(self) -> str:
        """ "4 steps"."""
        return steps_text(self.student_steps)

    @property
    def updates(self) -> int:
        """Updates done so far; all of them where the rung is finished (its log may be another run's)."""
        return self.max_train_steps if self.record is not None else sum(p.updates for p in self.phases)

    @property
    def main_phase(self) -> PhaseLog:
        """The phase with the most updates."""
        return max(self.phases, key=lambda phase: phase.max_train_steps)

    @property
    def max_train_steps(self) -> int:
        """Updates of all its phases."""
        return sum(phase.max_train_steps for phase in self.phases)


@dataclass(frozen=True)
class DataCounts:
    """What `prepare` made of the data: samples used, and those left out by kind, each with examples; where pictures keep
    their ratios, how many have each size, and how many were moved there from ratios that fewer than min_per_bucket have."""

    samples: int
    bad: dict[str, int]
    examples: dict[str, list[str]]
    sizes: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    min_per_bucket: int = 0

    def __str__(self) -> str:
        left = sum(self.bad.values())
        out = f"{left:,} of {self.samples + left:,} were" if left else "none was"
        text = f"Learned from {self.samples:,} samples; {out} left out."
        if not self.sizes:
            return text
        return f"{text} They have {sizes_text(self.sizes, moved=self.moved, least=self.min_per_bucket)}."


@dataclass(frozen=True)
class Run:
    """One run. `rows`, `metrics` and `floor` are empty where it is not evaluated yet."""

    name: str
    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rungs: tuple[RungLog, ...]
    data: "DataCounts | None"
    results: dict[str, Any] | None
    rows: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, dict[str, str]] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    other_noise: dict[str, float] = field(default_factory=dict)
    """Paired measures of the teacher with other seeds: how large they are where no map from noise to image is kept."""
    replicates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By row and metric: jackknife replicates, from which the standard error of a difference is told."""

    @property
    def reference(self) -> str | None:
        """The row that `*_to_teacher` is measured against."""
        return None if self.results is None else self.results.get("reference")

    def part(self, name: str) -> Any:
        """A key of results.json, None where it is not there."""
        return None if self.results is None else self.results.get(name)

    def renamed(self, name: str) -> "Run":
        """The same run under another name."""
        return replace(self, name=name)


def read_run(run_dir: Path) -> Run:
    """The run in a folder; ValueError in one line where it is none, or has nothing to report yet."""
    config = saved_config(run_dir)
    for key in ("teacher", "lora"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{run_dir / 'config.yaml'} is not the config of a run: {key} is no mapping")
    try:
        rungs = tuple(_rungs(run_dir, config))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{run_dir / 'config.yaml'} is not the config of a run: its ladder cannot be read"
        ) from None
    results = _paired_renamed(read_results(run_dir))
    if results is None and not any(rung.record or rung.updates for rung in rungs):
        raise ValueError(f"{run_dir} has nothing to report yet: run `stepdistill distill` first")
    name = run_dir.resolve().name
    environment = _environment(run_dir / "environment.json")
    data = _data(run_dir / "cache" / "manifest.json")
    if results is None:
        return Run(name, run_dir, config, environment, rungs, data, None)
    rows = tuple(_row(row) for row in results["rows"] if isinstance(row, dict) and "row" in row)
    return Run(
        name,
        run_dir,
        config,
        environment,
        rungs,
        data,
        results,
        rows=rows,
        metrics=results.get("metrics") or {},
        floor=_numbers(results.get("floor")),
        other_noise=_numbers(results.get("other_noise")),
        replicates=results.get("replicates") or {},
    )


def _numbers(values: Any) -> dict[str, float]:
    items = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in items if number(value) is not None}


def _paired_renamed(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """results.json of versions that measured FID to teacher at equal noise, under the name that this measure has today;
    their unpaired distances to the teacher are not known."""
    if results is None or "teacher_images" in (results.get("protocol") or {}):
        return results
    paired, metrics = "paired_fid_to_teacher", dict(results.get("metrics") or {})
    rows = [dict(row) for row in results["rows"] if isinstance(row, dict)]
    floor = {k: v for k, v in _numbers(results.get("floor")).items() if not k.endswith("_to_teacher")}
    for values in (metrics, *rows):
        if "fid_to_teacher" in values:
            values[paired] = values.pop("fid_to_teacher")
    if paired in metrics:
        metrics[paired] = {**metrics[paired], "title": "paired FID to teacher"}
    warnings = [*(results.get("warnings") or ()), _BEFORE]
    return results | {"rows": rows, "metrics": metrics, "floor": floor, "warnings": warnings}


def _objectives(phase: dict[str, Any]) -> str:
    """Such as "mse", or "mse+single" of a list, as Phase.title has it."""
    several = phase.get("objectives")
    return str(phase.get("objective") or "") if not several else "+".join(str(one["kind"]) for one in several)


def _environment(path: Path) -> dict[str, Any]:
    environment = read_sealed(path)
    if environment is None or any(isinstance(value, dict | list) for value in environment.values()):
        if path.exists():
            warn_of_damage(path, "the report says nothing of it; mend: `stepdistill prepare` writes it again")
        return {}
    return environment


def _data(path: Path) -> DataCounts | None:
    manifest = read_sealed(path)
    if manifest is not None and "bad" not in manifest:
        return None  # of an earlier version
    samples, bad, examples = ((manifest or {}).get(key) for key in ("samples", "bad", "bad_examples"))
    if type(samples) is int and isinstance(bad, dict) and isinstance(examples or {}, dict):
        lists = all(isinstance(names, list) for names in (examples or {}).values())
        if lists and all(type(count) is int for count in bad.values()):
            return _with_sizes(DataCounts(samples, bad, examples or {}), manifest or {})
    if path.exists():
        warn_of_damage(
            path, "the report says nothing of the data; mend: `stepdistill prepare` writes it again"
        )
    return None


def _with_sizes(counts: DataCounts, manifest: dict[str, Any]) -> DataCounts:
    """The counts with how pictures fall into sizes, where a manifest says it."""
    sizes = manifest.get("sizes")
    if not isinstance(sizes, dict) or not all(_is_size(*item) for item in sizes.items()):
        return counts
    moved, least = (int(number(manifest.get(key)) or 0) for key in ("moved", "min_per_bucket"))
    return replace(counts, sizes=sizes, moved=moved, min_per_bucket=least)


def _is_size(name: str, count: Any) -> bool:
    return len(name.split("x")) == 2 and number(count) is not None


def _record(path: Path) -> dict[str, Any] | None:
    record = read_sealed(path)
    if record is None and path.parent.is_dir():
        warn_of_damage(path, "the rung counts as not finished; mend: `stepdistill distill`")
    return record


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the keys that all have today."""
    kind = row.get("kind") or ("student" if row.get("distilled") else "teacher")
    steps = int(number(row.get("steps")) or 0)
    nfe = number(row.get("nfe")) or steps
    return row | {"row": str(row["row"]), "kind": str(kind), "steps": steps, "nfe": nfe}


def _looks(path: Path) -> dict[str, Any] | None:
    """What training/measure_looks.py wrote, None where there is none or it is damaged."""
    if not path.is_file():
        return None  # a version before, or preview.looks_images is 0
    looks: Any = read_sealed(path)
    if looks is None:
        warn_of_damage(path, "the report says nothing of how that phase's pictures look")
    try:
        images, per_image = looks["compared_with"]["images"], looks["per_image"]
        lists = [per_image[whose][look] for whose in ("student", "teacher", "data") for look in _LOOKS]
        teachers = [per_image["teacher"][look] for look in _LOOKS[:2]]
        whole = all(len(values) == images and None not in map(number, values) for values in lists)
        return looks if whole and images > 1 and all(sum(values) > 0 for values in teachers) else None
    except (KeyError, TypeError):
        return None


def _rungs(run_dir: Path, config: dict[str, Any]) -> Iterator[RungLog]:
    records: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for line in read_log(run_dir / "log.jsonl"):
        records.setdefault((line.get("rung", 0), line.get("phase", 0)), []).append(line)
    for index, rung in enumerate(config.get("ladder") or []):
        steps, key = int(rung["student_steps"]), f"ladder.{index}"
        folder = rung_folder(run_dir, steps)
        phases = tuple(
            PhaseLog(
                f"{key}.phases.{place}",
                _objectives(phase),
                int(phase.get("max_train_steps") or 0),
                tuple(records.get((steps, place), ())),
                _looks(folder / "previews" / f"phase{place}-{_objectives(phase)}-end.json"),
            )
            for place, phase in enumerate(rung.get("phases") or [])
        )
        previews = tuple(sorted((folder / "previews").glob("*-end.png")))
        record = _record(folder / RECORD_NAME)
        yield RungLog(
            key,
            int(rung["teacher_steps"]),
            steps,
            phases,
            record,
            previews,
            rung.get("node_steps"),
            rung.get("prediction_type"),
        )
