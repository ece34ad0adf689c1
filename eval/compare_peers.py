"""stepdistill beside published methods, with equal teacher, LoRA rank, batch size, data and budget of U-Net forwards.

    python eval/compare_peers.py [--config configs/letters.yaml] [--methods ...] [--seeds 0 1 2] [--size cpu|gpu]
        [--budget FORWARDS] [--tune] [--earlier OUTPUT.json] ... [key=value ...]

stepdistill      the config's ladder
stepdistill-mse  the config's ladder without its adversarial phases
progressive      progressive distillation: MSE only, halving the steps (Salimans and Ho)
lcm-lora         skip-step consistency
dmd2-lora        distribution matching, backward simulation, GAN
lightning        SDXL-Lightning as printed, down to 2 steps

A tenth of the captions is held out from all training, and only these captions are drawn. Letters are measured twice, by the
shipped reader and by a second one that was trained on other renderings (eval/second_reader.py); OUTPUT.md says whether both
order the methods alike. `--tune` tries each method at a third, one, three and nine times its default learning rate, with
another seed and a quarter of the budget. It writes the best factor to OUTPUT.rates.json, which later calls read. Any config
can be used, with its own teacher and folder of captioned images (data.source); for images other than letters it must
name the features for FID. An interrupted command resumes. `--earlier` takes over the results of another call with the same
settings, so that several machines can share seeds and methods.

On a GPU: python pipelines/train_teacher.py teachers/wide --widths 192 384 --unet-steps 20000 --device cuda, then --size gpu
--budget 2e7 --output eval/results/peers_gpu --output-dir runs/peers_gpu teacher.path=teachers/wide/teacher. Use a separate
--output for each teacher, world and budget: a call reads the tuned rates of its --output, whatever they were tuned for.
"""

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

from earlier_results import SeedResults, joined, read_earlier
from orders import agreement
from peers.methods import Method, methods
from side_by_side import (
    MAIN,
    STEPS,
    Table,
    arguments,
    base_config,
    by_steps,
    grid_of_rows,
    measure,
    share_cache,
    summary,
    write,
)

from stepdistill import plan
from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_json, write_json
from stepdistill.errors import NonFiniteError
from stepdistill.evaluation.check import check_evaluation
from stepdistill.evaluation.evaluation_set import evaluation_set_of
from stepdistill.runtime import source_commit

GRID_LABELS = {
    "teacher-4": "teacher 4",
    **{f"stepdistill-{n}": f"ours {n}" for n in (4, 2, 1)},
    "lcm-lora-4": "LCM-LoRA 4",
}
FACTORS = (1 / 3, 1.0, 3.0, 9.0)
TUNING_SEED, TUNING_SHARE = 100, 0.25
_TUNING = [
    "evaluation.num_images=400",
    "evaluation.teacher_steps=[32]",
    "evaluation.unguided_steps=[]",
    "evaluation.floor=true",
    "evaluation.diversity_prompts=0",
]

logger = logging.getLogger("compare_peers")


def train(method: Method, base: RunConfig, budget: float, factor: float) -> RunConfig:
    """Trains a method with its learning rates times `factor`; returns the config of its run."""
    config = method.config(base, budget, factor)
    share_cache(base, config)
    method.train(config, budget, factor)
    return config


def tune(args: argparse.Namespace, budget: float) -> None:
    """Finds the best of four learning-rate factors per method, and writes them to OUTPUT.rates.json.

    The best factor has the lowest mean, over step counts, of the logarithm of FID to the teacher's images from other seeds.
    So methods that add noise while sampling are judged like the others. FID to real would not do: its best rate is one that
    learns nothing, because the base model without guidance (rows unguided-N) is nearer to real images than the guided
    teacher, although it draws fewer prompts right.
    """
    path = args.output.with_suffix(".rates.json")
    if not base_config(args, TUNING_SEED, *_TUNING).evaluation.floor:
        raise ConfigError(
            "evaluation.floor: got false; allowed with --tune: true, because rates are judged by FID to the teacher's "
            "images from other seeds"
        )
    records: dict[str, Any] = read_json(path) or {}
    drawn: Path | None = None
    for method in chosen(args):
        if method.name in records:
            continue
        scores: dict[str, float | None] = {}
        for factor in FACTORS:
            folder = f"output_dir={args.output_dir}/tuning-{factor:.2f}"
            base = base_config(args, TUNING_SEED, *_TUNING, folder)
            try:
                config = train(method, base, budget * TUNING_SHARE, factor)
            except NonFiniteError as error:  # a rate at which training diverges is a result, too
                logger.info("tuning %s x %.2f: %s", method.name, factor, error)
                scores[f"{factor:.2f}"] = None
                continue
            table = measure(base, f"table-{method.name}", method.rows(config), drawn=drawn)
            drawn, rows = drawn or table.run_dir, table.rows
            names = [f"{method.name}-{n}" for n in STEPS]
            values = [rows[name]["fid_to_teacher"] for name in names if name in rows]
            scores[f"{factor:.2f}"] = sum(map(math.log, values)) / len(values)
            logger.info(
                "tuning %s x %.2f: FID to teacher %s", method.name, factor, [round(v, 1) for v in values]
            )
        trained = [factor for factor in FACTORS if scores[f"{factor:.2f}"] is not None]
        best = min(trained, key=lambda factor: scores[f"{factor:.2f}"])
        records[method.name] = {"factor": best, "mean_log_fid": scores}
        write_json(path, records)


def chosen(args: argparse.Namespace) -> list[Method]:
    """The methods of --methods in the given order; all methods by default."""
    available = methods()
    return [available[name] for name in args.methods or available]


def results_of_seed(
    args: argparse.Namespace,
    seed: int,
    budget: float,
    rates: dict[str, float],
    earlier: dict[tuple[int, str], SeedResults],
) -> tuple[Table, dict[str, dict[str, float]], dict[str, dict[str, str]]]:
    """Trains and measures the methods whose results are not in `earlier`.

    Returns the seed's table with all methods, the training cost of each method, and the source (file and commit) of each
    method that was taken from `earlier`.
    """
    base = base_config(args, seed)
    ready = {m.name: earlier[seed, m.name] for m in chosen(args) if (seed, m.name) in earlier}
    missing = [m for m in chosen(args) if m.name not in ready]
    trained = [(m, train(m, base, budget, rates.get(m.name, 1.0))) for m in missing]
    loras = [row for method, config in trained for row in method.rows(config)]
    local = measure(base, f"table-s{seed}", loras) if trained else None
    costs = {name: dict(results.costs[name]) for name, results in ready.items()}
    costs |= {m.name: m.cost(config) for m, config in trained}
    return joined(local, ready), costs, {name: results.source for name, results in ready.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compares stepdistill with published methods at equal compute."
    )
    arguments(parser, output="eval/results/peers", output_dir="runs/peers")
    parser.add_argument("--methods", nargs="+", choices=list(methods()))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--earlier", action="append", type=Path, default=[], metavar="OUTPUT.json")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at = source_commit()
    budget = args.budget or plan.training_forwards(base_config(args, 0))
    check_evaluation(base_config(args, 0))
    if args.tune:
        tune(args, budget)
    tuned = read_json(args.output.with_suffix(".rates.json")) or {}
    rates = {name: record["factor"] for name, record in tuned.items()}
    base = base_config(args, args.seeds[0])
    settings = {"config": args.config, "size": args.size, "budget": budget}
    settings |= {"num_images": base.evaluation.num_images, "overrides": args.overrides}
    earlier = read_earlier(args.earlier, settings, rates)
    results = [results_of_seed(args, seed, budget, rates, earlier) for seed in args.seeds]
    tables = [table for table, _, _ in results]
    teachers = {n: f"teacher-{n}" for n in base.evaluation.teacher_steps}
    names = [teachers[max(teachers)]]
    for n in STEPS:
        names += [teachers[n]] if n in teachers else []
        names += [f"unguided-{n}"] if n in base.evaluation.unguided_steps else []
        names += [f"{method.name}-{n}" for method in chosen(args)]
    text, table = summary(tables, [name for name in names if name in tables[0].rows])
    shown = ["teacher", "unguided", *(method.name for method in chosen(args))]
    parts = [by_steps(table, shown, m) for m in MAIN if any(m in row for row in table)]
    order, orders = agreement(tables, shown)
    notes = [method.note for method in chosen(args) if method.note]
    text = "\n\n".join([*parts, *notes, *([order] if order else []), text])
    payload = {"commit": made_at, **settings, "rates": rates, "seeds": args.seeds, "table": table}
    payload |= {
        "costs": [costs for _, costs, _ in results],
        "earlier": [sources for _, _, sources in results],
    }
    payload |= {"orders": orders}
    write(args.output, text, tables, payload)
    run_dir = next((t.run_dir for t in tables if t.run_dir is not None), None)
    if run_dir is not None:
        labels = {names[0]: names[0].replace("-", " ")} | GRID_LABELS
        grid_of_rows(run_dir, labels, evaluation_set_of(base).prompts).save(args.output.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
