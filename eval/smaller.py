"""A smaller student beside the full one: the same ladder on the teacher's own U-Net and on a smaller base.

    python eval/smaller.py [--config configs/letters_small.yaml] [--seeds 10 11 12] [--only NAME ...] [key=value ...]

full            the config's ladder without its `shrink` section
small           the config as it is: a smaller base imitates the teacher's output and features, the ladder climbs on it
output-alone    the same, but the smaller base imitates no features

All draw the same prompts from the same noise. The smaller bases' own rows are named <name>-base.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from typing import Any

from side_by_side import MAIN, STEPS, Table, arguments, base_config, by_steps, share_cache, summary, write

from stepdistill import stages
from stepdistill.config import RunConfig
from stepdistill.config.load import parse_config
from stepdistill.config.objective_kinds import compares_features
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import read_json
from stepdistill.evaluation.check import check_evaluation
from stepdistill.runtime import source_commit
from stepdistill.teacher.small_base import base_record

NAMES = ("full", "small", "output-alone")


def configured(base: RunConfig, name: str) -> RunConfig:
    """The run of this name."""
    raw = resolved(base) | {"name": f"{name}-s{base.seed}"}
    if name == "full":
        raw["shrink"] = None
    if name == "output-alone":
        kept = [o for o in raw["shrink"]["objectives"] if not compares_features(o["kind"])]
        raw["shrink"] |= {"objectives": kept}
    return parse_config(raw)


def trained(base: RunConfig, name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The rows of a run by name, and the record of its smaller base; empty for the full one."""
    config = configured(base, name)
    share_cache(base.model_copy(update={"shrink": None}), config)
    stages.run_all(config)
    results = read_json(config.run_dir / "evaluation" / "results.json")
    rows = {}
    for row in results["rows"]:
        kind, _, steps = row["row"].rpartition("-")
        if kind == "student":
            rows[f"{name}-{steps}"] = row
        elif kind == "smaller-base":
            rows[f"{name}-base"] = row
        elif name == "full":
            rows[row["row"]] = row
    return rows, base_record(config) or {}


def bases_text(bases: Mapping[str, Mapping[str, Any]]) -> str:
    """What was removed from each smaller base and what is left, as Markdown."""
    lines = ["| base | removed | parameters |", "| --- | --- | ---: |"]
    for name, base in bases.items():
        if base:
            share = base["parameters"] / base["parameters_of_original"]
            lines.append(f"| {name} | {', '.join(base['removed'])} | {100 * share:.0f} % |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares ladders on smaller bases with the full one.")
    arguments(parser, output="eval/results/smaller", output_dir="runs/smaller", seeds=(10, 11, 12))
    parser.set_defaults(config="configs/letters_small.yaml")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at, first = source_commit(), base_config(args, args.seeds[0])
    check_evaluation(first)
    tables, bases = [], dict[str, dict[str, Any]]()
    for seed in args.seeds:
        rows = dict[str, dict[str, Any]]()
        for name in args.only:
            of_run, bases[name] = trained(base_config(args, seed), name)
            rows |= of_run
        tables.append(Table(rows, None, None))
    names = [f"teacher-{max(first.evaluation.teacher_steps)}", *(f"{name}-base" for name in args.only)]
    names += [f"{name}-{n}" for n in STEPS for name in args.only]
    full, entries = summary(tables, [name for name in names if name in tables[0].rows])
    parts = [by_steps(entries, args.only, measure_name) for measure_name in MAIN]
    text = "\n\n".join([*parts, bases_text(bases), full])
    payload = {
        "commit": made_at,
        "config": args.config,
        "seeds": args.seeds,
        "table": entries,
        "bases": bases,
    }
    write(args.output, text, tables, payload | {"num_images": first.evaluation.num_images})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
