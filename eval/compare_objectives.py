"""The adversarial ladder beside the mse-only one: same teacher, data, seed and images; the README's table.

    python eval/compare_objectives.py [--num-images 2000] [--output eval/results/letters]

Three ladders: configs/letters.yaml, configs/letters_adversarial.yaml, and the first with its last rung converted to x0
(convert, then mse). Rungs that two ladders share are trained once. Writes OUTPUT.md, OUTPUT.json and the grid OUTPUT.png.
"""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

from side_by_side import share_rungs

from stepdistill import stages
from stepdistill.config import RunConfig
from stepdistill.config_file import load_config
from stepdistill.durable import read_json
from stepdistill.plan import training_forwards
from stepdistill.report.build import markdown_table
from stepdistill.run_folder import open_run
from stepdistill.rungs import read_rung
from stepdistill.runtime import source_commit
from stepdistill.training.log import read_log

X0 = "[{objective: convert, max_train_steps: 60}, {objective: mse, max_train_steps: 140, learning_rate: 0.002}]"
LADDERS = {
    "mse": ("configs/letters.yaml", []),
    "adversarial": ("configs/letters_adversarial.yaml", []),
    "x0": (
        "configs/letters.yaml",
        ["name=letters-x0", "ladder.4.prediction_type=sample", f"ladder.4.phases={X0}"],
    ),
}


def discriminator_accuracy(run_dir: Path) -> dict[str, float]:
    """Per adversarial phase the mean of D's two accuracies over its last quarter."""
    phases: dict[str, list[float]] = {}
    for record in read_log(run_dir / "log.jsonl"):
        if "discriminator_accuracy_teacher" in record:
            both = (record["discriminator_accuracy_teacher"] + record["discriminator_accuracy_student"]) / 2
            phases.setdefault(f"{record['rung']} {record['objective']}", []).append(both)
    last = {name: values[-max(1, len(values) // 4) :] for name, values in phases.items()}
    return {name: round(sum(values) / len(values), 3) for name, values in last.items()}


def share(first: RunConfig, config: RunConfig) -> None:
    """Copies into a new run what it has in common with a finished one: cache, leading equal rungs, teacher's images."""
    if config.run_dir.exists():
        return
    open_run(config)
    shutil.copytree(first.run_dir / "cache", config.run_dir / "cache")
    share_rungs(first, config)
    drawn = first.run_dir / "evaluation"
    for pattern in ("teacher-*", "floor", "features", "seeds/teacher-*", "studies"):
        for folder in drawn.glob(pattern):
            shutil.copytree(folder, config.run_dir / "evaluation" / folder.relative_to(drawn))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The adversarial ladder beside the mse-only one.")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--output-dir", default="runs/compare")
    parser.add_argument("--output", type=Path, default=Path("eval/results/letters"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    common = [f"output_dir={args.output_dir}", f"evaluation.num_images={args.num_images}"]
    common += ["evaluation.diversity_prompts=8", "evaluation.cost_batch_sizes=[1, 8, 32]"]
    configs = {label: load_config(path, common + more) for label, (path, more) in LADDERS.items()}
    table, facts, made_at = [], {}, source_commit()
    for label, config in configs.items():
        if label != "mse":
            share(configs["mse"], config)
        stages.run_all(config)
        results = read_json(config.run_dir / "report" / "results.json")
        records = [read_rung(config.run_dir, rung.student_steps) for rung in config.ladder]
        facts[label] = {
            "rows": results["rows"],
            "floor": results["floor"],
            "training_seconds": {r.student_steps: r.training_seconds for r in records if r is not None},
            "unet_forwards": round(training_forwards(config)),
            "discriminator_accuracy": discriminator_accuracy(config.run_dir),
            "environment": results["environment"],
        }
        for row in results["rows"]:
            if row["distilled"] and (label != "x0" or row["steps"] == 1):
                table.append(row | {"row": f"{row['row']}, {label}"})
            elif label == "mse":
                table.append(row)
    table.sort(key=lambda row: (row["distilled"], -row["steps"]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(configs["mse"].run_dir / "report" / "grid.png", args.output.with_suffix(".png"))
    text = markdown_table(table)
    args.output.with_suffix(".md").write_text(text + "\n")
    payload = {"commit": made_at, "num_images": args.num_images, "ladders": facts}
    args.output.with_suffix(".json").write_text(json.dumps(payload, indent=2) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
