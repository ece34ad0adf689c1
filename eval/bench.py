"""Iteration time of each phase over the sum of its bare U-Net passes: what our own code costs.

    python eval/bench.py [CONFIG] [--iterations 8] [--output eval/results/bench.json]

A bare pass is the U-Net alone at the phase's batch: a forward without adapters times the teacher's evaluations, plus one
LoRA forward and backward for the student, plus encoder passes for the discriminator, each timed in the same process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stepdistill.config import Phase, RunConfig
from stepdistill.config_file import load_config
from stepdistill.data.batches import draw_batch
from stepdistill.data.cache import load_cache
from stepdistill.data.prepare import prepare
from stepdistill.models.discriminator import build_discriminator, encode
from stepdistill.models.loading import load_schedule, load_unet, read_scheduler_config
from stepdistill.models.roles import Roles
from stepdistill.plan import phase_forwards
from stepdistill.runtime import environment
from stepdistill.teacher_source import teacher_folder
from stepdistill.training.steps import Denoisers, phase_step


def timed(action: Callable[[], object], iterations: int) -> float:
    """Median seconds of an action, after one that is not counted."""
    action()
    seconds = []
    for _ in range(iterations):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def bench_phase(config: RunConfig, phase: Phase, rung_index: int, iterations: int) -> dict:
    rung = config.ladder[rung_index]
    base = teacher_folder(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roles = Roles(load_unet(base).to(device), rank=config.lora.rank, seed=0)
    roles.teacher_is_base = rung_index == 0
    cache = load_cache(config)
    schedule, kind = load_schedule(read_scheduler_config(base))
    guidance = config.teacher.guidance_scale if roles.teacher_is_base else 1.0
    nets = Denoisers(roles, schedule, cache.unconditional.to(device, torch.float32), kind, kind, guidance)
    discriminator = build_discriminator(
        roles, phase, base=base, rank=config.lora.rank, seed=0, sample_size=cache.smallest_side
    )
    size = config.training.train_batch_size
    batch = draw_batch(
        cache,
        list(range(size)),
        student_steps=rung.student_steps,
        node_steps=rung.student_steps,
        seed=0,
        keys=("bench",),
        device=device,
        dtype=torch.float32,
    )

    def iteration() -> None:
        result = phase_step(nets, batch, phase, teacher_steps=rung.teacher_steps, discriminator=discriminator)
        for loss in result.losses.values():
            loss.backward()

    def teacher_forward() -> None:
        with roles.teacher():
            roles.predict(batch.noise, batch.timesteps, batch.conditioning)

    def student_pass() -> None:
        with roles.student():
            roles.predict(batch.noise, batch.timesteps, batch.conditioning).square().mean().backward()

    def encoder_pass() -> None:
        with roles.discriminator(trainable=True):
            x = batch.noise.clone().requires_grad_(True)
            encode(roles.unet, x, batch.timesteps, batch.conditioning)[-1].square().mean().backward()

    forwards = phase_forwards(config, rung, phase)
    evaluations = rung.teacher_steps // rung.student_steps * (2 if guidance > 1 else 1)
    encodings = {"paired": 4, "single": 3}.get(phase.objective, 0)
    bare = evaluations * timed(teacher_forward, iterations) + timed(student_pass, iterations)
    bare += encodings * timed(encoder_pass, iterations) if encodings else 0.0
    whole = timed(iteration, iterations)
    return {
        "rung": f"{rung.teacher_steps} -> {rung.student_steps}",
        "objective": phase.objective,
        "batch": size,
        "planned_forwards": round(forwards, 2),
        "iteration_seconds": round(whole, 4),
        "bare_seconds": round(bare, 4),
        "ratio": round(whole / bare, 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Iteration time over bare U-Net passes, per phase.")
    parser.add_argument("config", nargs="?", default="configs/letters.yaml")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(args.config, [f"output_dir={scratch}", "data.num_images=128"])
        prepare(config)
        rows = [
            bench_phase(config, Phase(objective=objective), rung, args.iterations)
            for objective, rung in (("mse", 0), ("mse", 1), ("paired", 1), ("single", 1), ("mse", 2))
        ]
    for row in rows:
        print(
            f"{row['rung']:>10} {row['objective']:>7}  {row['iteration_seconds']:.3f} s an iteration, "
            f"{row['bare_seconds']:.3f} s bare passes, ratio {row['ratio']:.2f}"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
