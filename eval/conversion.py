"""How many updates, at which learning rate, convert the 2-step student of Lightning's printed recipe to x0 prediction.

    python eval/conversion.py RUN [--updates 100 250 400] [--rates 1e-3 2e-3 4e-3] [--output eval/results/conversion]
        [--output-dir runs/conversion] [--only UPDATES RATE]

RUN is a run folder with the 2-step rung of configs/letters_lightning.yaml, such as compare_peers.py's lightning-s0. Each
trial starts from that rung, runs only the convert phase, and is drawn in one step. The goal is to draw as well as the
unconverted rung does in one step, because that rung is what the converted student learns from. `--only` runs one trial and
makes no table. Finished trials are not run again.
"""

import argparse
import itertools
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peers.methods import LIGHTNING
from side_by_side import MEASURES, measure, summary, write

from stepdistill import plan, stages
from stepdistill.config import LoraRow, RunConfig
from stepdistill.config.load import load_config, parse_config
from stepdistill.config.saved import resolved
from stepdistill.run.rungs import require_rung, rung_folder
from stepdistill.runtime import source_commit
from stepdistill.stages import open_run

START = 2
TABLE = {"teacher_steps": [32], "unguided_steps": [], "diversity_prompts": 0, "num_images": 256}
TABLE |= {"floor": False, "lora_scales": [], "matrix": False, "cost_batch_sizes": []}


def trial(run: RunConfig, output_dir: str, updates: int, rate: float) -> RunConfig:
    """A config with the run's rungs down to 2 steps, then the one-step rung with only its convert phase."""
    last = yaml.safe_load(LIGHTNING.read_text())["ladder"][-1]
    convert = last["phases"][0] | {"max_train_steps": updates, "learning_rate": rate}
    above = [rung for rung in resolved(run)["ladder"] if rung["student_steps"] >= START]
    changed = {"name": f"convert-{updates}-{rate:g}", "output_dir": output_dir}
    return parse_config(resolved(run) | changed | {"ladder": [*above, last | {"phases": [convert]}]})


def train(run: RunConfig, config: RunConfig) -> None:
    """Trains one trial from the run's 2-step student, on the run's latents."""
    open_run(config)
    steps = [rung.student_steps for rung in config.ladder[:-1]]
    for part in ("cache", *(f"rungs/{n}" for n in steps)):
        if not (config.run_dir / part).exists():
            shutil.copytree(run.run_dir / part, config.run_dir / part)
    stages.distill(config)
    stages.export(config)


def table(run: RunConfig, trials: Sequence[RunConfig], output_dir: str) -> tuple[str, dict[str, Any]]:
    """Measures the trials and the unconverted rung, each drawn in one step; returns a Markdown table and its data."""
    rows = [LoraRow(name="unconverted", path=str(rung_folder(run.run_dir, START)), steps=1)]
    rows += [LoraRow(name=t.name, path=str(rung_folder(t.run_dir, 1)), steps=1) for t in trials]
    measured = measure(with_options(run, output_dir), f"table-s{run.seed}", rows)
    _, entries = summary([measured], [row.name for row in rows])
    budget = plan.training_forwards(run)
    lines = [
        "| updates | learning rate | share of the run's forwards | prompt accuracy | paired FID to teacher |"
    ]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for about, entry in zip([None, *trials], entries, strict=True):
        cells = ["none", "", ""]
        if about is not None:
            phase = about.ladder[-1].phases[0]
            spent = plan.training_forwards(about) - plan.training_forwards(about, finished=[1])
            cells = [str(phase.max_train_steps), f"{phase.learning_rate:g}", f"{spent / budget:.2f}"]
            entry |= {
                "updates": phase.max_train_steps,
                "learning_rate": phase.learning_rate,
                "forwards": spent,
            }
        numbers = [
            f"{entry[m]['mean']:{MEASURES[m][1]}}" for m in ("prompt_accuracy", "paired_fid_to_teacher")
        ]
        lines.append("| " + " | ".join([*cells, *numbers]) + " |")
    return "\n".join(lines), {"run_forwards": budget, "tables": [measured], "rows": entries}


def with_options(run: RunConfig, output_dir: str) -> RunConfig:
    """The run's config with the evaluation settings of TABLE, which leave out everything that this table does not show."""
    return parse_config(
        resolved(run) | {"output_dir": output_dir, "evaluation": resolved(run)["evaluation"] | TABLE}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Finds updates and rates that convert a 2-step student to x0 output."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--updates", nargs="+", type=int, default=[100, 250, 400])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument(
        "--only", nargs=2, metavar=("UPDATES", "RATE"), help="run one trial, and make no table"
    )
    parser.add_argument("--output-dir", default="runs/conversion")
    parser.add_argument("--output", type=Path, default=Path("eval/results/conversion"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at, run = source_commit(), load_config(args.run)
    require_rung(run.run_dir, START)
    pairs = itertools.product(args.updates, args.rates)
    if args.only:
        pairs = iter([(int(args.only[0]), float(args.only[1]))])
    trials = [trial(run, args.output_dir, updates, rate) for updates, rate in pairs]
    for config in trials:
        train(run, config)
    if args.only:
        return 0
    text, about = table(run, trials, args.output_dir)
    write(args.output, text, about.pop("tables"), about | {"commit": made_at, "seed": run.seed})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
