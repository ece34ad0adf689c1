"""The adversarial ladder beside the mse-only one: same teacher, data, seed and images; the README's table.

    python eval/compare_objectives.py [--num-images 2000] [--output eval/results/letters]

Runs configs/letters.yaml and configs/letters_adversarial.yaml (finished rungs are kept), evaluates both on the same
prompts and noise, and writes OUTPUT.md, OUTPUT.json and the grid OUTPUT.png.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

from stepdistill import stages
from stepdistill.config_file import load_config
from stepdistill.durable import read_json
from stepdistill.plan import training_forwards
from stepdistill.report.build import markdown_table
from stepdistill.rungs import read_rung
from stepdistill.training.log import read_log


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def discriminator_accuracy(run_dir: Path) -> dict[str, float]:
    """Per adversarial phase the mean of D's two accuracies over its last quarter."""
    phases: dict[str, list[float]] = {}
    for record in read_log(run_dir / "log.jsonl"):
        if "discriminator_accuracy_teacher" in record:
            both = (record["discriminator_accuracy_teacher"] + record["discriminator_accuracy_student"]) / 2
            phases.setdefault(f"{record['rung']} {record['objective']}", []).append(both)
    return {name: sum(v[-(len(v) // 4 or 1) :]) / (len(v) // 4 or 1) for name, v in phases.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The adversarial ladder beside the mse-only one.")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--output-dir", default="runs")
    parser.add_argument("--output", type=Path, default=Path("eval/results/letters"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [f"output_dir={args.output_dir}", f"evaluation.num_images={args.num_images}"]
    table, facts = [], {}
    for label, path in (("mse", "configs/letters.yaml"), ("adversarial", "configs/letters_adversarial.yaml")):
        config = load_config(path, overrides)
        stages.run_all(config)
        results = read_json(config.run_dir / "report" / "results.json")
        records = [read_rung(config.run_dir, rung.student_steps) for rung in config.ladder]
        facts[label] = {
            "rows": results["rows"],
            "fid_floor": results["fid_floor"],
            "training_seconds": sum(r.training_seconds for r in records if r is not None),
            "unet_forwards": round(training_forwards(config)),
            "discriminator_accuracy": discriminator_accuracy(config.run_dir),
            "environment": results["environment"],
        }
        for row in results["rows"]:
            if row["distilled"]:
                table.append(row | {"row": f"{row['row']}, {label}"})
            elif label == "mse":
                table.append(row | {"row": row["row"]})
        if label == "mse":
            args.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(config.run_dir / "report" / "grid.png", args.output.with_suffix(".png"))
    table.sort(key=lambda row: (row["distilled"], -row["steps"], row["row"]))
    text = markdown_table(table)
    args.output.with_suffix(".md").write_text(text + "\n")
    payload = {"commit": commit(), "num_images": args.num_images, "ladders": facts}
    args.output.with_suffix(".json").write_text(json.dumps(payload, indent=2) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
