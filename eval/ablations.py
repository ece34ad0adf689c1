"""What each choice of the default recipe is worth: one thing changed at a time, equal U-Net forwards, three seeds.

    python eval/ablations.py [--config configs/letters.yaml] [--only NAME ...] [--seeds 10 11 12] [key=value ...]

A variant (eval/variants.py) changes the config, mostly its ladder. The updates of the changed rungs, and of the rungs below
them, are then scaled so that all training takes as many forwards as the default; --equal-updates leaves them as they are.
Leading rungs that a variant shares with the default are not trained again. A tenth of the captions is held out from
training, and only these captions are drawn.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence

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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measures the default recipe with one thing changed at a time."
    )
    # compare_peers.py uses other seeds, so a choice made here is not measured there on the same noise
    arguments(parser, output="eval/results/ablations", output_dir="runs/ablations", seeds=(10, 11, 12))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--equal-updates", action="store_true", help="in place of equal forwards")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at, chosen = source_commit(), list(dict.fromkeys(["default", *args.only]))
    budget = args.budget or plan.training_forwards(base_config(args, 0))
    tables, forwards = [], {}
    check_evaluation(base_config(args, 0))
    for seed in args.seeds:
        base, loras, first = base_config(args, seed), [], None
        for name in chosen:
            method = variant(name)
            config = (
                named(varied(name, base), name) if args.equal_updates else method.config(base, budget, 1.0)
            )
            share_cache(base, config)
            share_rungs(first or config, config)
            method.train(config, budget, 1.0)
            first = first or config
            forwards[name] = plan.training_forwards(config)
            loras += method.rows(config)
        tables.append(measure(base, f"table-s{seed}", loras))
    rows = [f"teacher-{max(base.evaluation.teacher_steps)}"]
    rows += [f"{name}-{n}" for n in STEPS for name in chosen if f"{name}-{n}" in tables[0].rows]
    full, table = summary(tables, rows)
    shown = [m for m in MAIN if any(m in entry for entry in table)]
    text = "\n\n".join([*(against_default(tables, chosen, forwards, m) for m in shown), full])
    payload = {"commit": made_at, "config": args.config, "size": args.size, "budget": budget}
    payload |= {"seeds": args.seeds, "num_images": base.evaluation.num_images, "table": table}
    write(args.output, text, tables, payload | {"forwards": forwards})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
