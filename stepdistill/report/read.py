"""Reads what a report needs from a run's folder, once. Keys that an older version did not write may be missing.

config.yaml                  the resolved config: ladder, updates
environment.json             software and hardware of the run
cache/manifest.json          how many samples were used for training, and which were left out
log.jsonl                    one line per update
rungs/<steps>/               finished rungs, their previews, and measurements of a few images at the end of each phase
evaluation/results.json      rows of numbers; gallery.py reads the images beside it
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepdistill.config.objective_kinds import has_critic, is_adversarial
from stepdistill.config.saved import saved_config
from stepdistill.disk.durable import read_sealed, warn_of_damage
from stepdistill.messages import sizes_text
from stepdistill.report.number_format import number, steps_text
from stepdistill.report.results import read_results
from stepdistill.run.log import read_log
from stepdistill.run.rungs import RECORD_NAME, rung_folder

_FORMER_NAMES = {"discriminator_accuracy_real": "discriminator_accuracy_teacher"}
_LOOKS = ("sharpness", "contrast", "colour")
_EQUAL_NOISE_WARNING = (
    "measured by an earlier version, which compared student and teacher at equal noise only: run `stepdistill evaluate` to "
    "measure FID to teacher against the teacher's images with other seeds"
)


@dataclass(frozen=True)
class PhaseLog:
    """One phase of a rung: its key and settings in the config, and its lines of log.jsonl in order."""

    key: str
    objective: str
    max_train_steps: int
    records: tuple[dict[str, Any], ...]
    looks: dict[str, Any] | None = None
    """Sharpness, contrast and colour of a few images at the end of the phase (training/measure_looks.py)."""

    @property
    def is_adversarial(self) -> bool:
        """Whether the phase has a discriminator."""
        return any(map(is_adversarial, self.objective.split("+")))

    @property
    def adversarial_loss(self) -> str:
        """The name in the log of the student's adversarial loss, without those of other objectives."""
        kinds = self.objective.split("+")
        alone = len(kinds) == 1
        return "student_loss" if alone else f"{next(filter(is_adversarial, kinds), 'student')}_loss"

    @property
    def has_critic(self) -> bool:
        """Whether the phase has a discriminator or a fake score, so that the student's loss is no distance."""
        return any(map(has_critic, self.objective.split("+")))

    @property
    def updates(self) -> int:
        """Updates done so far."""
        return max((int(record.get("step", -1)) + 1 for record in self.records), default=0)

    def values(self, name: str) -> list[float]:
        """The finite numbers logged under `name`, in order."""
        former = _FORMER_NAMES.get(name, name)  # of an earlier version
        numbers = (number(record.get(name, record.get(former))) for record in self.records)
        return [float(value) for value in numbers if value is not None]

    def updates_per_value(self, name: str) -> float:
        """Updates from one number logged under `name` to the next: more than 1 for what not every update computes."""
        return len(self.records) / max(1, len(self.values(name)))


@dataclass(frozen=True)
class RungLog:
    """One rung: its phases, and rung.json as `record` if the rung is finished."""

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
        """Updates done so far; all of them if the rung is finished, since its log may be in another run."""
        return self.max_train_steps if self.record is not None else sum(p.updates for p in self.phases)

    @property
    def main_phase(self) -> PhaseLog:
        """The phase with the most updates."""
        return max(self.phases, key=lambda phase: phase.max_train_steps)

    @property
    def max_train_steps(self) -> int:
        """Updates of all phases of the rung, as configured."""
        return sum(phase.max_train_steps for phase in self.phases)


@dataclass(frozen=True)
class DataCounts:
    """Counts from `prepare`: samples used, and samples left out by kind of problem (`bad`), with examples of each kind.

    sizes, moved: if images keep their aspect ratios, how many have each size, and how many of them were moved to another
    ratio because fewer than min_per_bucket images had theirs.
    """

    samples: int
    bad: dict[str, int]
    examples: dict[str, list[str]]
    sizes: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    min_per_bucket: int = 0

    def __str__(self) -> str:
        left = sum(self.bad.values())
        out = f"{left:,} of {self.samples + left:,} were" if left else "none was"
        text = f"Trained on {self.samples:,} samples; {out} left out."
        if not self.sizes:
            return text
        return f"{text} They have {sizes_text(self.sizes, moved=self.moved, least=self.min_per_bucket)}."


@dataclass(frozen=True)
class Run:
    """One run. If it is not evaluated yet, `results` is None and all fields after it are empty."""

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
    """Paired metrics of the teacher against itself with other noise: their value if nothing of the map from noise to image
    is preserved."""
    replicates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Jackknife replicates by row and metric, for the standard error of a difference between two rows."""

    @property
    def reference(self) -> str | None:
        """Name of the row that the `*_to_teacher` metrics compare with; None if the run is not evaluated."""
        return None if self.results is None else self.results.get("reference")

    def part(self, name: str) -> Any:
        """The value of a key of results.json; None if the key is missing or the run is not evaluated."""
        return None if self.results is None else self.results.get(name)

    @property
    def smaller_base(self) -> str | None:
        """What the smaller base model of a run with a `shrink` section is; None for other runs."""
        about = self.part("smaller_base")
        try:
            left, whole = int(about["parameters"]), int(about["parameters_of_original"])
            removed = ", ".join(map(str, about["removed"]))
        except (KeyError, TypeError, ValueError):
            return None
        return (
            f"a U-Net of {left:,} parameters, {left / max(whole, 1):.0%} of the teacher's, without {removed}"
        )

    def renamed(self, name: str) -> "Run":
        """The same run under another name."""
        return replace(self, name=name)


def read_run(run_dir: Path) -> Run:
    """Reads the run in a folder; ValueError of one line if the folder is not a run, or has nothing to report yet."""
    config = saved_config(run_dir)
    for key in ("teacher", "lora"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{run_dir / 'config.yaml'} is not the config of a run: {key} is not a mapping")
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
    """Results with the current metric names. Earlier versions stored the FID at equal noise as fid_to_teacher, which is now
    called paired_fid_to_teacher; they did not measure the unpaired distance, so fid_to_teacher is then missing."""
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
    warnings = [*(results.get("warnings") or ()), _EQUAL_NOISE_WARNING]
    return results | {"rows": rows, "metrics": metrics, "floor": floor, "warnings": warnings}


def _objectives(phase: dict[str, Any]) -> str:
    """The phase's objectives as in Phase.title: "mse", or "mse+single" for several."""
    several = phase.get("objectives")
    return str(phase.get("objective") or "") if not several else "+".join(str(one["kind"]) for one in several)


def _environment(path: Path) -> dict[str, Any]:
    environment = read_sealed(path)
    if environment is None or any(isinstance(value, dict | list) for value in environment.values()):
        if path.exists():
            warn_of_damage(path, "the report leaves it out; fix: `stepdistill prepare` writes it again")
        return {}
    return environment


def _data(path: Path) -> DataCounts | None:
    manifest = read_sealed(path)
    if manifest is not None and "bad" not in manifest:
        return None  # written by an earlier version
    samples, bad, examples = ((manifest or {}).get(key) for key in ("samples", "bad", "bad_examples"))
    if type(samples) is int and isinstance(bad, dict) and isinstance(examples or {}, dict):
        lists = all(isinstance(names, list) for names in (examples or {}).values())
        if lists and all(type(count) is int for count in bad.values()):
            return _with_sizes(DataCounts(samples, bad, examples or {}), manifest or {})
    if path.exists():
        warn_of_damage(
            path, "the report leaves out the data counts; fix: `stepdistill prepare` writes it again"
        )
    return None


def _with_sizes(counts: DataCounts, manifest: dict[str, Any]) -> DataCounts:
    """The counts with the number of images of each size, if the manifest has these."""
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
        warn_of_damage(path, "the rung counts as not finished; fix: `stepdistill distill`")
    return record


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results.json with the keys that every row has in the current version."""
    kind = row.get("kind") or ("student" if row.get("distilled") else "teacher")
    steps = int(number(row.get("steps")) or 0)
    nfe = number(row.get("nfe")) or steps
    return row | {"row": str(row["row"]), "kind": str(kind), "steps": steps, "nfe": nfe}


def _looks(path: Path) -> dict[str, Any] | None:
    """The measurements that training/measure_looks.py wrote; None if they are missing or damaged."""
    if not path.is_file():
        return None  # written by an earlier version, or preview.looks_images is 0
    looks: Any = read_sealed(path)
    if looks is None:
        warn_of_damage(path, "the report leaves out how that phase's images look")
    try:
        images, per_image = looks["compared_with"]["images"], looks["per_image"]
        lists = [per_image[source][look] for source in ("student", "teacher", "data") for look in _LOOKS]
        divisors = [per_image["teacher"][look] for look in _LOOKS[:2]]
        complete = all(len(values) == images and None not in map(number, values) for values in lists)
        return looks if complete and images > 1 and all(sum(values) > 0 for values in divisors) else None
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
