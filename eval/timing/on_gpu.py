"""Real updates at full size with random weights on this machine's GPU, beside their plan, eager and compiled."""

from collections.abc import Iterator
from typing import Any

import torch

from stepdistill.config.load import load_config
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import Card
from stepdistill.plan.real_update import measured_phases
from stepdistill.plan.whole_run import plan_run
from stepdistill.teacher.families import plannable_facts

BLOCKS = (("sd15", False), ("sdxl_24gb", False), ("sd15", True), ("sdxl_24gb", True))
"""Config and training.compile, the most useful first: the time may end before the last."""


def on_gpu(card: Card, name: str, compiles: bool, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """A row per kind of phase of a shipped config: planned and measured bytes and seconds."""
    config = load_config(name, [f"training.compile={str(compiles).lower()}", *overrides])
    facts = plannable_facts(config)
    keeps = kept_modules(config, facts)
    plan = plan_run(config, facts, card, keeps=keeps)
    for cost, update in measured_phases(config, facts, plan, keeps):
        yield {
            "config": name,
            "compile": compiles,
            "phase": cost.title,
            "planned_bytes": cost.update.peak,
            "bytes": update.peak,
            "planned_seconds": cost.update.micro.seconds,
            "seconds": update.seconds,
        }
        torch.cuda.empty_cache()
