"""What the shipped configs take at full size, by their plans: memory and hours on the card that each is meant for.

    python eval/full_size.py [--configs sd15 sdxl_24gb ...] [--output eval/results/full_size] [key=value ...]
                                                      with --configs, the others keep the numbers that OUTPUT.json has
    python eval/full_size.py --growth                 memory and time of SDXL by micro-batch, image size and rank

The numbers are those of `stepdistill plan`: one update of every phase on the meta device. On a machine with a CUDA GPU two
real updates of every kind of phase are measured, too, with random weights.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.disk.durable import read_json
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import GIB, card_of
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.real_update import measured_phases
from stepdistill.plan.whole_run import plan_run
from stepdistill.runtime import environment
from stepdistill.teacher.families import plannable_facts

CARDS = {
    "sd15_8gb": "8GB",
    "sd15_12gb": "12GB",
    "sd15": "24GB",
    "sd21_v": "24GB",
    "sdxl_12gb": "12GB",
    "sdxl_16gb": "16GB",
    "sdxl_24gb": "24GB",
    "sdxl_dmd2_24gb": "24GB",
    "sdxl": "h100",
    "sdxl_8x80gb": "h100",
    "sd35_medium_24gb": "24GB",
    "z_image_24gb": "24GB",
}
"""The card that each config of a released model is meant for."""
GROWTH = {
    "train_batch_size": [("training.train_batch_size={}", size) for size in (1, 2, 4, 8, 16)],
    "resolution": [("data.resolution={}", side) for side in (512, 768, 1024, 1280, 1536)],
    "rank": [("lora.rank={}", rank) for rank in (8, 16, 32, 64, 128)],
}
"""What `--growth` changes in configs/sdxl_24gb.yaml, one setting at a time."""


def planned(config: RunConfig, card: str) -> dict[str, Any]:
    """Peaks in bytes of all, by phase and by stage, what the card has, and hours of training and evaluation. Previews do not
    count, because they are left out if they do not fit."""
    facts = plannable_facts(config)
    plan = plan_run(config, facts, card_of(card), keeps=kept_modules(config, facts))
    return {
        "card": plan.card.name,
        "usable_bytes": round(plan.card.usable_gib * GIB),
        "peak": plan.peak,
        "phases": {cost.title: {"peak": cost.update.peak, **vars(cost.update.total)} for cost in plan.phases},
        "stages": plan.stages,
        "training_hours": sum(cost.seconds for cost in plan.phases) / 3600,
        "evaluation_hours": plan.evaluation / 3600,
    }


def measured(config: RunConfig, card: str) -> dict[str, Any]:
    """Peak bytes and seconds of two real updates of every kind of phase on this machine's GPU."""
    facts = plannable_facts(config)
    keeps = kept_modules(config, facts)
    plan = plan_run(config, facts, card_of(card), keeps=keeps)
    return {cost.title: vars(update) for cost, update in measured_phases(config, facts, plan, keeps)}


def table(results: dict[str, Any]) -> str:
    """A Markdown row per config."""
    lines = [
        "| config | card | mse | adversarial | previews | prepare | evaluate | to spare | training |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        phases, stages = result["phases"], result["stages"]
        peaks = [
            max(of["peak"] for title, of in phases.items() if ("mse" in title) == is_mse)
            for is_mse in (True, False)
        ]
        sizes = [*peaks, *(stages[stage] for stage in ("previews", "prepare", "evaluate"))]
        cells = " | ".join(f"{size / GIB:.1f}" for size in sizes)
        spare = (result["usable_bytes"] - result["peak"]) / GIB
        card = CARDS[name].upper().replace("GB", " GB")
        lines.append(f"| {name} | {card} | {cells} | {spare:.1f} | {result['training_hours']:.0f} h |")
    return "\n".join(lines)


def growth() -> dict[str, list[dict[str, Any]]]:
    """Updates of SDXL by micro-batch, image size and rank: peak bytes, FLOP and seconds of a micro-batch, by objective."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, changes in GROWTH.items():
        found[name] = []
        for template, value in changes:
            config = load_config(
                "configs/sdxl_24gb.yaml", ["training.memory_budget=null", template.format(value)]
            )
            dry_run = DryRun(config, plannable_facts(config), card_of("rtx4090"))
            rung, row = config.ladder[2], {"value": value}
            paired = rung.phases[-1].model_copy(update={"objective": "paired"})
            for phase in (*rung.phases, paired):
                cost = dry_run.update(rung, phase)
                micro = config.training.gradient_accumulation_steps * config.training.train_batch_size
                each = {"peak": cost.peak, "seconds_per_sample": cost.total.seconds / micro}
                row[phase.title] = each | {"flop_per_sample": cost.total.flop / micro}
            found[name].append(row)
    return found


def growth_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown row per value."""
    lines = [
        "| changed | value | mse, GiB | single | paired | mse, TFLOP a sample | single | mse, s a sample | single |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        for row in rows:
            mse, single = row["mse"], row["single"]
            lines.append(
                f"| {name} | {row['value']} | {mse['peak'] / GIB:.1f} | {single['peak'] / GIB:.1f} | "
                f"{row['paired']['peak'] / GIB:.1f} | "
                f"{mse['flop_per_sample'] / 1e12:.1f} | {single['flop_per_sample'] / 1e12:.1f} | "
                f"{mse['seconds_per_sample']:.2f} | {single['seconds_per_sample']:.2f} |"
            )
    return "\n".join(lines)


def write(output: Path, results: dict[str, Any], text: str) -> None:
    """Writes the numbers as JSON and as a table, and prints the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(
        json.dumps({"environment": environment()} | results, indent=2) + "\n"
    )
    output.with_suffix(".md").write_text(text + "\n")
    print(text)


def earlier(output: Path) -> dict[str, Any]:
    """The results that a file of an earlier call has, by config. Its environment is that of the last call."""
    stored = read_json(output.with_suffix(".json")) or {}
    return {name: stored[name] for name in CARDS if name in stored}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="What the shipped configs take at full size, by their plans."
    )
    parser.add_argument("--configs", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.growth:
        found = growth()
        write(args.output or Path("eval/results/growth"), found, growth_table(found))
        return 0
    output = args.output or Path("eval/results/full_size")
    results = earlier(output) if set(args.configs) < set(CARDS) else {}
    for name in args.configs:
        config = load_config(f"configs/{name}.yaml", args.overrides)
        results[name] = planned(config, CARDS[name])
        if torch.cuda.is_available():
            results[name]["measured"] = measured(config, CARDS[name])
    results = {name: results[name] for name in CARDS if name in results}
    write(output, results, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
