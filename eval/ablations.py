"""What each choice of the default recipe is worth: one thing changed at a time, equal U-Net forwards, three seeds.

    python eval/ablations.py [--config configs/letters.yaml] [--only NAME ...] [--seeds 10 11 12] [--earlier OUTPUT.json] ...
        [key=value ...]

A variant (eval/variants.py) changes the config, mostly its ladder. The updates of the changed rungs, and of the rungs below
them, are then scaled so that all training takes as many forwards as the default; --equal-updates leaves them as they are.
Leading rungs that a variant shares with the default are not trained again. A tenth of the captions is held out from
training, and only these captions are drawn.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from earlier_results import SeedResults, joined, read_earlier
from peers.methods import named
from side_by_side import (
    MAIN,
    MEASURES,
    STEPS,
    Table,
    arguments,
    base_config,
    mean_and_spread,
    measure,
    share_cache,
    share_rungs,
    step_count,
    summary,
    write,
)
from variants import VARIANTS, variant, varied

from stepdistill import plan
from stepdistill.evaluation.check import check_evaluation
from stepdistill.runtime import source_commit


def against_default(
    tables: Sequence[Table], names: Sequence[str], forwards: Mapping[str, float], measure_name: str
) -> str:
    """A Markdown table of one measure with a column per step count: first the means of the default, then each variant's
    difference from the default.

    The deviations of the differences are taken over seeds after subtracting, because a seed shifts every variant alike.
    `forwards`: U-Net forwards of each variant's training, for the last column.
    """
    title, spec = MEASURES[measure_name]
    lines = [f"| {title} | " + " | ".join(map(step_count, STEPS)) + " | forwards |"]
    lines.append("| --- |" + " ---: |" * (len(STEPS) + 1))
    for name in names:
        cells = []
        for n in STEPS:
            pairs = [
                (t.rows.get(f"{name}-{n}", {}).get(measure_name), t.rows[f"default-{n}"]) for t in tables
            ]
            is_default = name == "default"
            values = [v - (0 if is_default else d[measure_name]) for v, d in pairs if v is not None]
            cells.append(mean_and_spread(values, spec if is_default else f"+{spec.lstrip('+')}"))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {forwards[name]:.0f} |")
    return "\n".join(lines)


def results_of_seed(
    args: argparse.Namespace,
    seed: int,
    chosen: Sequence[str],
    budget: float,
    ready: Mapping[str, SeedResults],
) -> tuple[Table, dict[str, dict[str, float]]]:
    """One seed's table, and the training cost of each variant; those in `ready` are neither trained nor measured."""
    base, loras, first = base_config(args, seed), [], None
    costs = {name: dict(results.costs[name]) for name, results in ready.items()}
    for name in (name for name in chosen if name not in ready):
        method = variant(name)
        config = named(varied(name, base), name) if args.equal_updates else method.config(base, budget, 1.0)
        share_cache(base, config)
        share_rungs(first or config, config)
        method.train(config, budget, 1.0)
        first = first or config
        costs[name] = {"unet_forwards": plan.training_forwards(config)}
        loras += method.rows(config)
    local = measure(base, f"table-s{seed}", loras) if loras else None
    return joined(local, ready), costs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measures the default recipe with one thing changed at a time."
    )
    # compare_peers.py uses other seeds, so a choice made here is not measured there on the same noise
    arguments(parser, output="eval/results/ablations", output_dir="runs/ablations", seeds=(10, 11, 12))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--equal-updates", action="store_true", help="in place of equal forwards")
    parser.add_argument("--earlier", action="append", type=Path, default=[], metavar="OUTPUT.json")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at, chosen = source_commit(), list(dict.fromkeys(["default", *args.only]))
    base = base_config(args, args.seeds[0])
    budget = args.budget or plan.training_forwards(base)
    check_evaluation(base)
    settings = {"config": args.config, "size": args.size, "budget": budget}
    settings |= {"num_images": base.evaluation.num_images, "overrides": args.overrides}
    earlier = read_earlier(args.earlier, settings, {})
    results = []
    for seed in args.seeds:
        ready = {name: earlier[seed, name] for name in chosen if (seed, name) in earlier}
        results.append(results_of_seed(args, seed, chosen, budget, ready))
    tables = [table for table, _ in results]
    forwards = {name: results[0][1][name]["unet_forwards"] for name in chosen}
    rows = [f"teacher-{max(base.evaluation.teacher_steps)}"]
    rows += [f"{name}-{n}" for n in STEPS for name in chosen if f"{name}-{n}" in tables[0].rows]
    full, table = summary(tables, rows)
    shown = [m for m in MAIN if any(m in entry for entry in table)]
    text = "\n\n".join([*(against_default(tables, chosen, forwards, m) for m in shown), full])
    payload = {"commit": made_at, **settings, "rates": {}, "seeds": args.seeds, "table": table}
    payload |= {"costs": [costs for _, costs in results], "earlier": [str(f.name) for f in args.earlier]}
    write(args.output, text, tables, payload)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
