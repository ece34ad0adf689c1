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
from full_size import CONFIGS, estimate

from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.config.sections import CheckpointOptions
from stepdistill.data.prepare import prepare
from stepdistill.ladder import load_shared
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import build_discriminator
from stepdistill.models.shared_network import STUDENT
from stepdistill.runtime import Runtime, environment
from stepdistill.stages import open_run
from stepdistill.training.checkpoint import Checkpoints, Identity
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase import PhaseState, copied, update
from stepdistill.training.phase_setup import PhaseSetup

POSITION, PHASE = 2, 1  # the letters' 8 -> 4 rung, its adversarial phase
LARGE = 2**29
_PER_PARAMETER = 3 * 4  # a float32 parameter and Adam's two moments
_IN_ESTIMATE = 4 * 4  # full_size.py also counts the gradient
_INTERVAL = 60 * (CheckpointOptions().every_minutes or 0)


def phase_state(config: RunConfig, runtime: Runtime) -> tuple[PhaseSetup, PhaseState]:
    """The adversarial phase before its first update."""
    rung = config.ladder[POSITION]
    phase = rung.phases[PHASE].model_copy(update={"max_train_steps": 10_000})
    shared = load_shared(config, runtime)
    student = Denoiser(shared.network, STUDENT, shared.noise_path, "epsilon", trains=True)
    discriminator = build_discriminator(
        shared.network,
        phase,
        base=shared.base,
        rank=config.lora.rank,
        seed=0,
        sample_size=shared.cache.smallest_side,
    )
    setup = PhaseSetup(
        rung=rung,
        phase=phase,
        number=PHASE,
        training=config.training,
        seed=config.seed,
        student=student,
        teacher=shared.undistilled,
        discriminator=discriminator,
        cache=shared.cache,
        preview=lambda _name: None,
    )
    return setup, PhaseState(setup, runtime)


def writer(folder: Path) -> Checkpoints:
    def identity(_phase: int, _step: int) -> Identity:
        return Identity(settings={}, rungs={}, base="", cache="", samples=0, versions={})

    return Checkpoints(folder, identity, every_minutes=0, keep=2, seconds=0.0)


def seconds_of(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measured(config: RunConfig, place: Path, updates: int) -> dict[str, float]:
    """Medians over the updates: seconds of an update, also while a checkpoint is written; of the copy; of the writing; and
    the bytes of a checkpoint."""
    runtime = Runtime()
    setup, state = phase_state(config, runtime)
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


def computed(path: str, family: str, per_byte: dict[str, float]) -> dict[str, float]:
    """Bytes of a checkpoint of a shipped config at full size, and its seconds at the measured rates."""
    found = estimate(load_config(path), family)
    discriminator = max(phase.get("discriminator", 0) for phase in found["phases"].values())
    size = (found["parts"]["student"] + discriminator) * _PER_PARAMETER // _IN_ESTIMATE
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
    full_size = {name: computed(name, family, per_byte) for name, family in CONFIGS.items()}
    results = {"environment": environment(), "rates": per_byte, "letters": letters, "full_size": full_size}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
