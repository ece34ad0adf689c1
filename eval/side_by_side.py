"""Shared by all comparisons: held-out captions, one table per seed by the package's evaluation, means over seeds."""

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from second_reader import measured_again

from stepdistill import stages
from stepdistill.config import LoraRow, RunConfig
from stepdistill.config.load import load_config
from stepdistill.disk.durable import read_json
from stepdistill.images.image_grid import image_grid
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import environment
from stepdistill.stages import open_run

STEPS = (8, 4, 2, 1)
SIZES = {"cpu": ["training.train_batch_size=32"], "gpu": ["training.train_batch_size=256"]}
MEASURES = {
    "fid_to_real": ("FID to real", ".1f"),
    "fid_to_teacher": ("FID to teacher", ".2f"),
    "paired_fid_to_teacher": ("paired FID to teacher", ".2f"),
    "prompt_accuracy": ("prompt accuracy", ".3f"),
    "second_fid_to_real": ("second reader's FID to real", ".1f"),
    "second_fid_to_teacher": ("second reader's FID to teacher", ".2f"),
    "second_prompt_accuracy": ("second reader's prompt accuracy", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "sharpness_drift": ("sharpness drift", "+.3f"),
    "diversity": ("diversity", ".3f"),
}
MAIN = ("fid_to_real", "fid_to_teacher", "paired_fid_to_teacher", "prompt_accuracy")
HELD_OUT = 0.1
COLUMNS = 10
# Telling methods apart needs many images and seeds, but no sweep of LoRA scales, no matrix and no timing of every row.
_MEASURED = ["evaluation.num_images=1000", "evaluation.diversity_prompts=16"]
_MEASURED += [f"evaluation.unguided_steps={list(STEPS)}"]
_MEASURED += ["evaluation.lora_scales=[]", "evaluation.matrix=false", "evaluation.cost_batch_sizes=[]"]


def arguments(
    parser: argparse.ArgumentParser, *, output: str, output_dir: str, seeds: Sequence[int] = (0, 1, 2)
) -> None:
    """Adds the command-line options that all comparisons share."""
    parser.add_argument("--config", default="configs/letters.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--budget", type=float, help="U-Net forwards; default: those of the config's ladder")
    parser.add_argument("--output-dir", default=output_dir)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def base_config(args: argparse.Namespace, seed: int, *more: str) -> RunConfig:
    """The config of --config with the settings that all methods of a comparison share."""
    common = [f"output_dir={args.output_dir}", f"seed={seed}", f"data.held_out={HELD_OUT}", *_MEASURED]
    return load_config(args.config, [*common, *SIZES[args.size], *more, *args.overrides])


def share_cache(base: RunConfig, config: RunConfig) -> None:
    """Prepares the latents of a seed once, and copies them into the run of `config`."""
    first = base.model_copy(update={"name": f"cache-s{base.seed}", "ladder": ()})
    stages.prepare(first)
    if not (config.run_dir / "cache").exists():
        open_run(config)
        shutil.copytree(first.run_dir / "cache", config.run_dir / "cache")


def share_rungs(first: RunConfig, config: RunConfig) -> None:
    """Copies the leading rungs that the run of `config` shares with the finished run of `first`."""
    alike = {"name": first.name, "ladder": first.ladder}
    if config.model_copy(update=alike) != first:
        return
    for ours, theirs in zip(config.ladder, first.ladder, strict=False):
        source, target = (rung_folder(c.run_dir, ours.student_steps) for c in (first, config))
        if ours != theirs or not source.exists():
            break
        if not target.exists():
            shutil.copytree(source, target)


@dataclass(frozen=True)
class Table:
    """One seed's results.

    rows        measures by name of row
    floor       distances between two sets of real images, and between two sets of the teacher's images
    run_dir     the run folder with the images of each row in evaluation/<row>; None if they are on another machine
    replicates  the jackknife's replicates by row and measure
    """

    rows: dict[str, dict[str, Any]]
    floor: dict[str, Any] | None
    run_dir: Path | None
    replicates: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def measure(base: RunConfig, name: str, loras: Sequence[LoraRow], *, drawn: Path | None = None) -> Table:
    """Draws and measures every LoRA in one table beside the teacher, with the config's features, and for letters with the
    second reader too.

    Args:
        base: the settings that all methods share.
        name: the table's run folder is output_dir/name.
        loras: the rows beside the teacher's.
        drawn: run folder of another table; its images of the teacher are reused if they are the same.
    """
    options = base.evaluation.model_copy(update={"loras": tuple(loras)})
    config = base.model_copy(update={"name": name, "evaluation": options, "ladder": ()})
    if drawn is not None:
        open_run(config)
        _share_images(drawn, config.run_dir)
    stages.evaluate(config)
    stages.report(config)
    results = read_json(config.run_dir / "evaluation" / "results.json")
    rows = {row["row"]: row for row in results["rows"]}
    again, replicates = measured_again(config, rows), results["replicates"]
    for row, measures in again.rows.items():
        rows[row] |= measures
        replicates[row] |= again.replicates[row]
    return Table(rows, (results.get("floor") or {}) | again.floor, config.run_dir, replicates)


def _share_images(source: Path, target: Path) -> None:
    """Copies the images of the teacher's rows and of its floor that the target lacks. The evaluation redraws those whose
    key does not fit."""
    for pattern in ("teacher-*", "unguided-*", "floor"):
        for folder in (source / "evaluation").glob(pattern):
            if not (target / "evaluation" / folder.name).exists():
                shutil.copytree(folder, target / "evaluation" / folder.name)


def summary(tables: Sequence[Table], rows: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """A Markdown table of the means ± standard deviations over the seeds' tables, and the same as data."""
    entries = []
    for name in rows:
        drawn = [table.rows[name] for table in tables]
        entry: dict[str, Any] = {"row": name, "nfe": drawn[0]["nfe"]}
        for measure_name in MEASURES:
            values = [row[measure_name] for row in drawn if row.get(measure_name) is not None]
            if values:
                entry[measure_name] = _mean_and_deviation(values)
        entries.append(entry)
    shown = {m: about for m, about in MEASURES.items() if any(m in entry for entry in entries)}
    head = ["model", "U-Net passes", *(title for title, _ in shown.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for entry in entries:
        cells = [_cell(entry.get(m), spec) for m, (_, spec) in shown.items()]
        lines.append(f"| {entry['row']} | {entry['nfe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines), entries


def step_count(steps: int) -> str:
    """The heading of a column, such as "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def mean_and_spread(values: Sequence[float], spec: str) -> str:
    """Mean and standard deviation as text, such as "33.8 ± 4.1"; empty if there are no values."""
    return _cell(_mean_and_deviation(values) if values else None, spec)


def _mean_and_deviation(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def by_steps(entries: Sequence[dict[str, Any]], names: Sequence[str], measure_name: str) -> str:
    """A Markdown table of one measure from `summary`'s data: a row per name, a column per step count."""
    title, spec = MEASURES[measure_name]
    cells = {entry["row"]: entry.get(measure_name) for entry in entries}
    lines = [f"| {title} | " + " | ".join(map(step_count, STEPS)) + " |"]
    lines.append("| --- |" + " ---: |" * len(STEPS))
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get(f"{name}-{n}"), spec) for n in STEPS) + " |")
    return "\n".join(lines)


def grid_of_rows(run_dir: Path, rows: dict[str, str], prompts: Sequence[str]) -> Image.Image:
    """A grid of the first images of each row that the run folder has; each column has one prompt and one noise."""
    shown = {}
    for name, label in rows.items():
        folder = run_dir / "evaluation" / name / "images"
        if folder.is_dir():
            files = [folder / f"{k:06d}.png" for k in range(min(COLUMNS, len(prompts)))]
            shown[label] = [Image.open(file) for file in files]
    return image_grid(shown, headings=prompts[:COLUMNS], max_tile=256)


def write(output: Path, text: str, tables: Sequence[Table], payload: dict[str, Any]) -> None:
    """Writes `text` to OUTPUT.md, and `payload` with the tables and the environment to OUTPUT.json."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(text + "\n")
    payload |= {"environment": environment(), "floors": [table.floor for table in tables]}
    payload["tables"] = [table.rows for table in tables]
    output.with_suffix(".json").write_text(json.dumps(payload, indent=2) + "\n")


def _cell(value: dict[str, Any] | None, spec: str) -> str:
    if value is None:
        return ""
    spread = "" if value["std"] is None else f" ± {value['std']:{spec.lstrip('+')}}"
    return f"{value['mean']:{spec}}{spread}"
