"""What each choice of the default recipe is worth: one thing changed at a time, equal U-Net forwards, three seeds.

    python eval/ablations.py [--config configs/letters.yaml] [--only NAME ...] [--seeds 0 1 2] [key=value ...]

A variant changes the ladder of the config; the updates of the rungs it changes, and of those below, are then scaled so that
the whole takes as many forwards. Leading rungs shared with the default are not trained again. A tenth of the captions
is kept out of training and is what is drawn.
"""

import argparse
import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

from peers.methods import Method, ladder_method
from side_by_side import STEPS, arguments, base_config, measure, share_cache, share_rungs, summary, write

from stepdistill import plan
from stepdistill.config import RunConfig
from stepdistill.config_file import parse_config
from stepdistill.evaluation.evaluate import check_evaluation
from stepdistill.run_folder import resolved
from stepdistill.runtime import source_commit

Ladder = list[dict[str, Any]]
ADVERSARIAL = ("paired", "single")


def adversarial_phases(ladder: Ladder) -> list[dict[str, Any]]:
    """The adversarial phases of all rungs."""
    return [phase for rung in ladder for phase in rung["phases"] if phase["objective"] in ADVERSARIAL]


def with_discriminator(**options: Any) -> Callable[[Ladder], Ladder]:
    """Every discriminator with these options."""

    def change(ladder: Ladder) -> Ladder:
        for phase in adversarial_phases(ladder):
            phase["discriminator"] |= options
        return ladder

    return change


def with_mse(**options: Any) -> Callable[[Ladder], Ladder]:
    """Every mse phase below the first rung with these options."""

    def change(ladder: Ladder) -> Ladder:
        for rung in ladder[1:]:
            for phase in rung["phases"]:
                if phase["objective"] == "mse":
                    phase |= options
        return ladder

    return change


def without_adversary(ladder: Ladder) -> Ladder:
    """mse alone."""
    for rung in ladder:
        rung["phases"] = [phase for phase in rung["phases"] if phase["objective"] not in ADVERSARIAL]
    return ladder


def paired_alone(ladder: Ladder) -> Ladder:
    """D is told x_t throughout."""
    for phase in adversarial_phases(ladder):
        phase["objective"] = "paired"
    return ladder


def paired_then_single(ladder: Ladder) -> Ladder:
    """The paper's order: half of the adversarial updates with x_t, then half without."""
    for rung in ladder:
        rung["phases"] = [half for phase in rung["phases"] for half in _halves(phase)]
    return ladder


def _halves(phase: dict[str, Any]) -> list[dict[str, Any]]:
    if phase["objective"] not in ADVERSARIAL:
        return [phase]
    updates = max(1, phase["max_train_steps"] // 2)
    return [copy.deepcopy(phase) | {"objective": kind, "max_train_steps": updates} for kind in ADVERSARIAL]


def skip_level(ladder: Ladder) -> Ladder:
    """The mse teacher of every rung below the second is the student of two rungs before."""
    for before, rung in zip(ladder, ladder[2:], strict=False):
        for phase in rung["phases"]:
            if phase["objective"] == "mse":
                phase["teacher_steps"] = before["student_steps"]
    return ladder


def x0_at_one_step(ladder: Ladder) -> Ladder:
    """The last rung is converted to predict x0 first."""
    last = ladder[-1]
    convert = copy.deepcopy(last["phases"][0]) | {"objective": "convert", "learning_rate": 1e-3}
    convert["max_train_steps"] = max(1, last["phases"][0]["max_train_steps"] // 3)
    last |= {"prediction_type": "sample", "phases": [convert, *last["phases"]]}
    return ladder


def from_128(ladder: Ladder) -> Ladder:
    """The first rung learns four moves of a 128-step teacher at once, as the paper has it."""
    ladder[0]["teacher_steps"] = 4 * ladder[0]["student_steps"]
    return ladder


def without_four(ladder: Ladder) -> Ladder:
    """32 -> 8 -> 2 -> 1."""
    kept = [rung for rung in ladder if rung["student_steps"] != 4]
    return [rung | {"teacher_steps": 8} if rung["student_steps"] == 2 else rung for rung in kept]


VARIANTS: dict[str, Callable[[Ladder], Ladder]] = {
    "default": lambda ladder: ladder,
    "mse-alone": without_adversary,
    "paired-then-single": paired_then_single,
    "paired-alone": paired_alone,
    "teacher-as-real": with_discriminator(real="teacher"),
    "head-on-the-middle": with_discriminator(heads="mid"),
    "non-saturating": with_discriminator(loss="non_saturating"),
    "trunk-frozen": with_discriminator(trunk="frozen"),
    "trunk-full": with_discriminator(trunk="full"),
    "perturbation-5-1-1-1": with_discriminator(perturbation_weights=[5.0, 1.0, 1.0, 1.0]),
    "loss-in-epsilon": with_mse(loss_space="epsilon"),
    "loss-in-v": with_mse(loss_space="v_prediction"),
    "skip-level": skip_level,
    "x0-at-one-step": x0_at_one_step,
    "from-128": from_128,
    "without-four": without_four,
}


def variant(name: str) -> Method:
    """The default recipe with one thing changed."""

    def change(config: RunConfig) -> RunConfig:
        raw = resolved(config)
        raw["ladder"] = VARIANTS[name](copy.deepcopy(raw["ladder"]))
        return parse_config(raw)

    return ladder_method(name, change)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One thing of the default recipe changed at a time.")
    arguments(parser, output="eval/results/ablations", output_dir="runs/ablations")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at, chosen = source_commit(), list(dict.fromkeys(["default", *args.only]))
    budget = args.budget or plan.training_forwards(base_config(args, 0))
    tables = []
    check_evaluation(base_config(args, 0))
    for seed in args.seeds:
        base, loras, first = base_config(args, seed), [], None
        for name in chosen:
            method = variant(name)
            config = method.config(base, budget, 1.0)
            share_cache(base, config)
            share_rungs(first or config, config)
            method.train(config, budget, 1.0)
            first = first or config
            loras += method.rows(config)
        tables.append(measure(base, f"table-s{seed}", loras))
    rows = [f"teacher-{max(base.evaluation.teacher_steps)}"]
    rows += [f"{name}-{n}" for n in STEPS for name in chosen if f"{name}-{n}" in tables[0].rows]
    text, table = summary(tables, rows)
    payload = {
        "commit": made_at,
        "config": args.config,
        "size": args.size,
        "budget": budget,
        "seeds": args.seeds,
    }
    write(args.output, text, tables, payload | {"num_images": base.evaluation.num_images, "table": table})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
