"""The field's methods beside ours: one teacher, LoRA rank, batch, data, and budget of U-Net forwards; three seeds.

    python eval/compare_peers.py [--config configs/letters.yaml] [--methods ...] [--seeds 0 1 2] [--size cpu|gpu]
        [--budget FORWARDS] [--tune] [key=value ...]

stepdistill    the config's own ladder        progressive   MSE alone, halving (Salimans and Ho)
lcm-lora       skip-step consistency          dmd2-lora     distribution matching, backward simulation, GAN
lightning      SDXL-Lightning as printed

A tenth of the captions is kept out of every training and is what is drawn. `--tune` tries each method at learning rates of
a third, one and three times its own, on another seed with a quarter of the budget, and keeps the best in OUTPUT.rates.json,
which later calls read. Any config runs: name a teacher and a folder of captioned pictures in it (data.source), and for other
pictures than letters the features that FID is measured on. All of it resumes: nothing finished is made again.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from peers.methods import STEPS, Method, methods

from stepdistill import plan, stages
from stepdistill.config import RunConfig
from stepdistill.config_file import load_config
from stepdistill.durable import read_json, write_json
from stepdistill.runtime import source_commit

FACTORS = (1 / 3, 1.0, 3.0)
TUNING_SEED, TUNING_SHARE, TUNING_IMAGES = 100, 0.25, 400
SIZES = {
    "cpu": ["training.train_batch_size=32"],
    "gpu": ["training.train_batch_size=256"],
}
MEASURES = {
    "fid_to_real": ("FID to real", ".1f"),
    "fid_to_teacher": ("FID to teacher", ".2f"),
    "prompt_accuracy": ("prompt accuracy", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "sharpness_drift": ("sharpness drift", "+.3f"),
    "diversity": ("diversity", ".3f"),
}
_LEAN = ["floor=false", "lora_scales=[]", "matrix=false", "cost_batch_sizes=[]", "diversity_prompts=0"]

logger = logging.getLogger("compare_peers")


def base_config(args: argparse.Namespace, seed: int, *more: str) -> RunConfig:
    """The user's config with what all methods share here."""
    common = [
        f"output_dir={args.output_dir}",
        f"seed={seed}",
        "data.held_out=0.1",
        "evaluation.teacher_steps=[32, 8, 4, 2, 1]",
        *(f"evaluation.{lean}" for lean in _LEAN[1:4]),
    ]
    return load_config(args.config, [*common, *SIZES[args.size], *more, *args.overrides])


def train(method: Method, base: RunConfig, budget: float, factor: float) -> RunConfig:
    """The method's run, trained."""
    config = method.config(base, budget, factor)
    method.train(config, budget, factor)
    return config


def measure(base: RunConfig, name: str, trained: list[tuple[Method, RunConfig]]) -> list[dict[str, Any]]:
    """All methods' rows in one table, drawn and measured by the package's own evaluation."""
    loras = [row for method, config in trained for row in method.rows(config)]
    options = base.evaluation.model_copy(update={"loras": tuple(loras)})
    config = base.model_copy(update={"name": name, "evaluation": options, "ladder": ()})
    stages.evaluate(config)
    stages.report(config)
    return read_json(config.run_dir / "evaluation" / "results.json")["rows"]


def tune(args: argparse.Namespace, budget: float) -> dict[str, float]:
    """The best of three learning-rate factors per method, by the mean logarithm of FID to real over the step counts."""
    path = args.output.with_suffix(".rates.json")
    found: dict[str, Any] = read_json(path) or {}
    for method in chosen(args):
        if method.name in found:
            continue
        scores = {}
        for factor in FACTORS:
            more = [f"output_dir={args.output_dir}/tuning-{factor:.2f}", *(f"evaluation.{x}" for x in _LEAN)]
            more.append(f"evaluation.num_images={TUNING_IMAGES}")
            base = base_config(args, TUNING_SEED, *more, "evaluation.teacher_steps=[32]")
            config = train(method, base, budget * TUNING_SHARE, factor)
            rows = {row["row"]: row for row in measure(base, f"table-{method.name}", [(method, config)])}
            values = [rows[f"{method.name}-{n}"]["fid_to_real"] for n in STEPS]
            scores[factor] = sum(map(math.log, values)) / len(values)
            logger.info(
                "tuning %s x %.2f: FID to real %s", method.name, factor, [round(v, 1) for v in values]
            )
        found[method.name] = {"factor": min(scores, key=scores.get), "mean_log_fid": scores}
        write_json(path, found)
    return {name: record["factor"] for name, record in found.items()}


def chosen(args: argparse.Namespace) -> list[Method]:
    """The methods asked for, in their order."""
    known = methods()
    return [known[name] for name in args.methods or known]


def summary(seeds: list[dict[str, Any]], names: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The Markdown table of means with deviations over seeds, and the same as data."""
    rows = []
    for steps, name in [(32, "teacher"), *((n, name) for n in STEPS for name in ("teacher", *names))]:
        key = f"{name}-{steps}"
        drawn = [seed["rows"][key] for seed in seeds if key in seed["rows"]]
        values = {m: [row[m] for row in drawn if row.get(m) is not None] for m in MEASURES}
        rows.append(
            {"row": key, "steps": steps, "method": name, "nfe": drawn[0]["nfe"]}
            | {
                m: {
                    "mean": statistics.fmean(v),
                    "std": statistics.pstdev(v) if len(v) < 2 else statistics.stdev(v),
                }
                for m, v in values.items()
                if v
            }
        )
    shown = {m: about for m, about in MEASURES.items() if any(m in row for row in rows)}
    head = ["model", "U-Net passes", *(title for title, _ in shown.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = []
        for m, (_, spec) in shown.items():
            value = row.get(m)
            spread = f" ± {value['std']:{spec.lstrip('+')}}" if value and len(seeds) > 1 else ""
            cells.append("" if value is None else f"{value['mean']:{spec}}{spread}")
        lines.append(f"| {row['row']} | {row['nfe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines), rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The field's methods beside ours at equal compute.")
    parser.add_argument("--config", default="configs/letters.yaml")
    parser.add_argument("--methods", nargs="+", choices=list(methods()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument(
        "--budget", type=float, help="U-Net forwards; the config's own ladder's where not given"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output-dir", default="runs/peers")
    parser.add_argument("--output", type=Path, default=Path("eval/results/peers"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at = source_commit()
    budget = args.budget or plan.training_forwards(base_config(args, 0))
    rates = tune(args, budget) if args.tune else {}
    kept = read_json(args.output.with_suffix(".rates.json")) or {}
    rates = {name: record["factor"] for name, record in kept.items()} | rates
    seeds = []
    for seed in args.seeds:
        base = base_config(args, seed)
        trained = [(m, train(m, base, budget, rates.get(m.name, 1.0))) for m in chosen(args)]
        rows = {row["row"]: row for row in measure(base, f"table-s{seed}", trained)}
        costs = {
            m.name: dict(zip(("unet_forwards", "training_seconds"), m.cost(c), strict=True))
            for m, c in trained
        }
        seeds.append({"seed": seed, "rows": rows, "costs": costs})
    text, table = summary(seeds, [m.name for m in chosen(args)])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".md").write_text(text + "\n")
    payload = {"commit": made_at, "config": args.config, "size": args.size, "budget": budget, "rates": rates}
    payload |= {"num_images": base.evaluation.num_images, "table": table, "seeds": seeds}
    args.output.with_suffix(".json").write_text(json.dumps(payload, indent=2) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
