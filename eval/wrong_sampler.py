"""How much worse a rung's images become with a wrong sampler, and what load_few_step does about it.

    python eval/wrong_sampler.py RUN [--steps 4] [--num-images 500] [--output eval/results/wrong_sampler]

Each setting is drawn by the plain pipeline and measured as a row of the table. Then it is combined with load_few_step in
both orders: a setting made before load_few_step must be corrected, and one made after it must cause a warning.
"""

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler

from stepdistill import stages
from stepdistill.config import LoraRow, RunConfig
from stepdistill.config.load import load_config
from stepdistill.disk.durable import read_json
from stepdistill.evaluation.measure.metrics import METRICS
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import environment
from stepdistill.sampling import FewStepWarning, load_few_step
from stepdistill.teacher.loading import load_pipeline
from stepdistill.teacher.source import teacher_folder

Change = Callable[[DiffusionPipeline], None]
MEASURED = ("prompt_accuracy", "fid_to_teacher", "paired_fid_to_teacher", "fid_to_real")


def with_scheduler(kind: Any, **options: Any) -> Change:
    """Sets a scheduler of this class, with the configuration of the pipeline's scheduler and these options."""

    def change(pipeline: DiffusionPipeline) -> None:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)

    return change


def settings(path: Path, steps: int) -> dict[str, tuple[LoraRow, Change | None, dict[str, Any]]]:
    """The settings by name: (row of the table, change of the pipeline or None, arguments of the call)."""

    def row(name: str, **options: Any) -> LoraRow:
        return LoraRow(**{"name": name, "path": str(path), "steps": steps, **options})

    leading = {"timestep_spacing": "leading"}
    return {
        "leading timesteps": (
            row("leading", scheduler="DDIMScheduler", scheduler_options=leading),
            with_scheduler(DDIMScheduler, **leading),
            {},
        ),
        "LCMScheduler as it comes": (
            row("lcm", scheduler="LCMScheduler", scheduler_options={}),
            with_scheduler(LCMScheduler),
            {},
        ),
        "guidance 7": (row("guidance", guidance_scale=7.0), None, {"guidance_scale": 7.0}),
        f"{5 * steps} steps": (row("steps", steps=5 * steps), None, {"num_inference_steps": 5 * steps}),
        "Euler, trailing (right as well)": (
            row("euler", scheduler="EulerDiscreteScheduler"),
            with_scheduler(EulerDiscreteScheduler, timestep_spacing="trailing"),
            {},
        ),
    }


def measured(
    config: RunConfig, rows: list[LoraRow], steps: int, num_images: int
) -> dict[str, dict[str, Any]]:
    """Draws and measures these rows in a copy of the run; returns all rows of its table by name."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / config.run_dir.resolve().name
        shutil.copytree(config.run_dir, copy, ignore=shutil.ignore_patterns("evaluation", "report"))
        short = load_config(
            copy,
            [
                f"evaluation.num_images={num_images}",
                "evaluation.teacher_steps=[32]",
                "evaluation.floor=true",
                "evaluation.diversity_prompts=0",
                "evaluation.lora_scales=[]",
                "evaluation.matrix=false",
                "evaluation.cost_batch_sizes=[]",
                f"evaluation.loras={json.dumps([row.model_dump(mode='json') for row in rows])}",
            ],
        )
        stages.evaluate(short)
        results = read_json(copy / "evaluation" / "results.json")
    return {row["row"]: row for row in results["rows"]}


def drawn(pipeline: DiffusionPipeline, prompt: str, **options: Any) -> tuple[torch.Tensor, list[str]]:
    """Latents of one image, and the messages of the FewStepWarnings that drawing it caused."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        latents = pipeline(
            prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **options
        ).images
    return latents, [str(w.message) for w in caught if issubclass(w.category, FewStepWarning)]


def answers(config: RunConfig, folder: Path, change: Change | None, call: dict[str, Any]) -> tuple[str, str]:
    """What load_few_step does about a setting that is made before it, and about one that is made after it."""

    def pipeline_with(*changes: Change) -> DiffusionPipeline:
        pipeline = load_pipeline(teacher_folder(config))
        for apply in changes:
            apply(pipeline)
        return pipeline

    def load(pipeline: DiffusionPipeline) -> None:
        load_few_step(pipeline, folder)

    prompt = config.preview.prompts[0]
    right, _ = drawn(pipeline_with(load), prompt)
    before = "no setting of the pipeline's"
    if change is not None:
        latents, warned = drawn(pipeline_with(change, load), prompt)
        before = "put right" if torch.equal(latents, right) and not warned else "NOT put right"
    _, warned = drawn(pipeline_with(load, *([change] if change else [])), prompt, **call)
    return before, "warned of" if warned else "no warning"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    shown = {key: METRICS[key] for key in MEASURED}
    head = ["setting", *(about["title"] for about in shown.values()), "before load_few_step", "after it"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(shown) + " --- | --- |"]
    for row in rows:
        numbers = [f"{row[key]:{'.3f' if key == 'prompt_accuracy' else '.1f'}}" for key in shown]
        lines.append("| " + " | ".join([row["setting"], *numbers, row["before"], row["after"]]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measures what a wrong sampler costs, and what load_few_step does about it."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("eval/results/wrong_sampler"))
    args = parser.parse_args(argv)
    config = load_config(args.run)
    folder = rung_folder(config.run_dir, args.steps)
    wrong = settings(folder.resolve(), args.steps)
    numbers = measured(config, [row for row, _, _ in wrong.values()], args.steps, args.num_images)
    as_set = numbers[f"student-{args.steps}"]
    rows = [
        {
            "setting": "as load_few_step sets it",
            **{k: as_set[k] for k in MEASURED},
            "before": "",
            "after": "no warning",
        }
    ]
    for name, (row, change, call) in wrong.items():
        before, after = answers(config, folder, change, call)
        measures = {k: numbers[row.name][k] for k in MEASURED}
        rows.append({"setting": name, **measures, "before": before, "after": after})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"environment": environment(), "steps": args.steps, "num_images": args.num_images, "rows": rows}
    args.output.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
