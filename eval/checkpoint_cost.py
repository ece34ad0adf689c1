"""What a checkpoint costs: how long it stops the training thread, its bytes, and both for the shipped configs at full size.

    python eval/checkpoint_cost.py [--updates 24] [--output eval/results/checkpoint_cost] [key=value ...]

Measured on the letters' 8 -> 4 rung, in its adversarial phase, whose checkpoint is the largest: the seconds of an update;
of the copy that the training thread makes; of the writing, hashing and syncing that a thread does meanwhile. The rates of
copying and of writing are measured on a state of 512 MiB. Computed for the full-size configs: bytes, from the shapes of
their modules on the meta device, and seconds at these rates.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import CARDS
from timing.clock import seconds_of
from timing.phases import phase_state

from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.config.sections import CheckpointOptions
from stepdistill.data.prepare import prepare
from stepdistill.plan.dry_update import MOMENTS
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.runtime import Runtime, environment
from stepdistill.stages import open_run
from stepdistill.teacher.families import plannable_facts
from stepdistill.training.checkpoint import Checkpoints, Identity
from stepdistill.training.losses import roles_of
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase import copied, update

POSITION, PHASE = 2, 1  # the letters' 8 -> 4 rung, its adversarial phase
LARGE = 2**29
_FLOAT32 = 4
_INTERVAL = 60 * (CheckpointOptions().every_minutes or 0)


def writer(folder: Path) -> Checkpoints:
    def identity(_phase: int, _step: int) -> Identity:
        return Identity(settings={}, rungs={}, base="", cache="", samples=0, versions={})

    return Checkpoints(folder, identity, every_minutes=0, keep=2, seconds=0.0)


def measured(config: RunConfig, place: Path, updates: int) -> dict[str, float]:
    """Medians over the updates: seconds of an update, also while a checkpoint is written; of the copy; of the writing; and
    the bytes of a checkpoint."""
    runtime = Runtime()
    phase = config.ladder[POSITION].phases[PHASE].model_copy(update={"max_train_steps": 10_000})
    setup, state = phase_state(config, POSITION, phase, runtime)
    batches, checkpoints = MicroBatches(setup, runtime), writer(place)
    alone, beside, copying, writing = [], [], [], []
    update(setup, state, batches, runtime)
    for _ in range(updates):
        alone.append(seconds_of(lambda: update(setup, state, batches, runtime)))
        copying.append(seconds_of(lambda: checkpoints.save(PHASE, state.step, state.state_dict(), None)))
        started = time.perf_counter()
        beside.append(seconds_of(lambda: update(setup, state, batches, runtime)))
        checkpoints.wait()
        writing.append(time.perf_counter() - started)
    batches.close()
    newest = max(place.iterdir(), key=lambda folder: folder.name)
    return {
        "update_seconds": statistics.median(alone),
        "update_seconds_while_writing": statistics.median(beside),
        "stall_seconds": statistics.median(copying),
        "update_and_writing_seconds": statistics.median(writing),
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


def rates(place: Path) -> dict[str, float]:
    """Seconds per byte of the training thread's copy, and of the writing, on a large state: the best of three."""
    state = {"student": {"weight": torch.randn(LARGE // 4)}}
    copies, writes = [], []
    for step in range(3):
        copies.append(seconds_of(lambda: copied(state)))
        checkpoints = writer(place)
        checkpoints.save(0, step, state, None)
        writes.append(seconds_of(checkpoints.wait))
    return {"copy": min(copies) / LARGE, "write": min(writes) / LARGE}


def computed(name: str, per_byte: dict[str, float]) -> dict[str, float]:
    """Bytes of the largest checkpoint of a shipped config at full size, and its seconds at the measured rates."""
    config = load_config(name)
    rehearsal, count = Rehearsal(config, plannable_facts(config), device="meta"), 0
    for phase in (phase for rung in config.ladder for phase in rung.phases):
        with torch.device("meta"), rehearsal.critics_of(phase):
            roles = [rehearsal.network.weights(role) for role in roles_of(phase)]
            count = max(count, sum(weights.master.numel() for weights in roles))
    size = count * round(_FLOAT32 + MOMENTS[config.training.optimizer])
    return {
        "bytes": size,
        "stall_seconds": size * per_byte["copy"],
        "writing_seconds": size * per_byte["write"],
    }


def table(results: dict[str, Any]) -> str:
    """One row per config."""
    lines = [
        "| config | checkpoint | training stops for | share of the time, one every 10 min | written meanwhile in |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = {"letters (measured)": results["letters"], **results["full_size"]}
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['bytes'] / 2**20:,.1f} MiB | {row['stall_seconds']:.3f} s | "
            f"{row['stall_seconds'] / _INTERVAL:.4%} | {row['writing_seconds']:.2f} s |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what a checkpoint costs.")
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("eval/results/checkpoint_cost"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        config = load_config("letters", [f"output_dir={place}/runs", *args.overrides])
        open_run(config)
        prepare(config)
        letters = measured(config, Path(place) / "checkpoints", args.updates)
        per_byte = rates(Path(place) / "large")
    letters["writing_seconds"] = letters["update_and_writing_seconds"] - letters["update_seconds"]
    full_size = {name: computed(name, per_byte) for name in CARDS}
    results = {"environment": environment(), "rates": per_byte, "letters": letters, "full_size": full_size}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
