"""The overhead of this package: iterations against their bare U-Net passes, waiting for data, preparing against encoding.

    python eval/bench.py [CONFIG] [--iterations 8] [--output eval/results/bench.json]

The bare passes run the network alone on the phase's batch, each timed in the same process: the teacher's evaluations, one
LoRA forward and backward of the student, and encoder passes of the discriminator. The time spent waiting for data comes from
a rung's log. Preparing is timed on photograph-sized JPEGs with a VAE of Stable Diffusion's size. What Python takes is timed
on SDXL's module tree with few channels, where computing takes nearly nothing.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from random_teacher import build, build_vae, unet_config

from stepdistill.config import Data, Phase, RunConfig, Rung
from stepdistill.config.load import load_config
from stepdistill.data.batches import Batch, draw_batch
from stepdistill.data.buckets import Sizes
from stepdistill.data.cache import LatentCache, load_cache
from stepdistill.data.decode import cover
from stepdistill.data.encode import Encoder, encode_pixels
from stepdistill.data.prepare import prepare
from stepdistill.data.records import records
from stepdistill.data.source import image_of
from stepdistill.diffusion.grid import passes_per_step
from stepdistill.diffusion.noise_path import VariancePreserving
from stepdistill.ladder import distill
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator, build_discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork
from stepdistill.plan import phase_forwards
from stepdistill.run.log import read_log
from stepdistill.runtime import environment
from stepdistill.stages import open_run
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import load_encoders, load_noise_path
from stepdistill.teacher.source import teacher_folder
from stepdistill.training.phase import losses_and_gradients
from stepdistill.training.samples import Samples


def timed(action: Callable[[], object], iterations: int) -> float:
    """Median seconds of `iterations` calls of an action, after one call that is not counted."""
    action()
    seconds = []
    for _ in range(iterations):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def denoisers(config: RunConfig, rung_index: int, device: torch.device) -> tuple[Denoiser, Denoiser]:
    """The untrained student and the teacher of a rung. The first rung's teacher is the base model with guidance."""
    base = teacher_folder(config)
    unet = load_network(base).to(device)
    network = SharedNetwork.with_student_and_teacher(unet, rank=config.lora.rank, seed=0)
    noise_path, kind = load_noise_path(TeacherFacts.of_folder(base).scheduler)
    student = Denoiser(network, STUDENT, noise_path.to(device), kind, trains=True)
    if rung_index:
        return student, dataclasses.replace(student, adapter=TEACHER, trains=False)
    guided = {"guidance_scale": config.teacher.guidance_scale}
    guided["unconditional"] = load_cache(config).unconditional.to(device, torch.float32)
    return student, dataclasses.replace(student, adapter=None, trains=False, **guided)


def bench_phase(config: RunConfig, phase: Phase, rung_index: int, iterations: int) -> dict:
    """Seconds of an iteration of one phase, of its bare passes, and their ratio."""
    rung = config.ladder[rung_index]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = denoisers(config, rung_index, device)
    cache = load_cache(config)
    discriminator = build_discriminator(
        student.network,
        phase,
        base=teacher_folder(config),
        rank=config.lora.rank,
        seed=0,
        sample_size=cache.smallest_side,
    )
    batch = first_batch(config, rung, phase, cache, student.noise_path, device)

    def iteration() -> None:
        samples = Samples(batch, student=student, teacher=teacher, discriminator=discriminator)
        losses_and_gradients(samples, phase, torch.Tensor.backward)

    evaluations = rung.teacher_steps // rung.student_steps * passes_per_step(teacher.guidance_scale)
    bare = bare_seconds(batch, teacher, discriminator, evaluations, iterations)
    whole = timed(iteration, iterations)
    return {
        "rung": f"{rung.teacher_steps} -> {rung.student_steps}",
        "objective": phase.title,
        "batch": len(batch.noise),
        "planned_forwards": round(phase_forwards(config, rung, phase), 2),
        "iteration_seconds": round(whole, 4),
        "bare_seconds": round(bare, 4),
        "ratio": round(whole / bare, 3),
    }


def first_batch(
    config: RunConfig,
    rung: Rung,
    phase: Phase,
    cache: LatentCache,
    noise_path: VariancePreserving,
    device: torch.device,
) -> Batch:
    """The first batch of a phase, drawn as in training."""
    return draw_batch(
        cache,
        list(range(config.training.train_batch_size)),
        noise_path=noise_path,
        student_steps=rung.student_steps,
        node_steps=rung.student_steps,
        teacher_steps=rung.teacher_steps,
        perturbation_weights=phase.discriminator.perturbation_weights,
        seed=0,
        keys=("bench",),
        dtype=torch.float32,
    ).to(device)


def bare_seconds(
    batch: Batch, teacher: Denoiser, discriminator: Discriminator | None, evaluations: int, iterations: int
) -> float:
    """Seconds of an update's passes alone: the teacher's evaluations, the student's forward and backward, and the
    discriminator's encoder passes (4 if paired, 3 if single)."""
    network, inputs = teacher.network, (batch.noise, batch.timesteps, batch.conditioning)

    def teacher_forward() -> None:
        with torch.no_grad(), network.using(teacher.adapter):
            network.ask(*inputs)

    def student_pass() -> None:
        with network.using(STUDENT):
            network.ask(*inputs).square().mean().backward()

    seconds = evaluations * timed(teacher_forward, iterations) + timed(student_pass, iterations)
    if discriminator is None:
        return seconds

    def encoder_pass() -> None:
        with discriminator.active(trains=True):
            x = batch.noise.clone().requires_grad_(True)
            discriminator.features(x, batch.timesteps, batch.conditioning)[-1].square().mean().backward()

    return seconds + (4 if discriminator.paired else 3) * timed(encoder_pass, iterations)


def bench_waiting(config: RunConfig, iterations: int) -> dict:
    """The share of a rung's training time that is spent waiting for micro-batches."""
    rung = config.ladder[1]
    phases = tuple(phase.model_copy(update={"max_train_steps": iterations}) for phase in rung.phases[:1])
    short = rung.model_copy(update={"phases": phases, "teacher_steps": rung.teacher_steps})
    config = config.model_copy(update={"name": "waiting", "ladder": (short,)})
    open_run(config)
    prepare(config)
    distill(config)
    lines = read_log(config.run_dir / "log.jsonl")[1:]
    waited = sum(line["data_seconds"] for line in lines)
    whole = sum(config.training.train_batch_size / line["images_per_second"] for line in lines)
    return {
        "waited_seconds": round(waited, 4),
        "seconds": round(whole, 3),
        "share": round(waited / whole, 5),
        "seconds_an_update": round(whole / len(lines), 4),
    }


def bench_preparing(scratch: Path, *, images: int = 8, side: int = 192) -> dict:
    """Seconds to prepare a shard of 1600 x 1200 JPEGs, and their ratio to those of the bare VAE on the same batches."""
    build("sd15", tiny=True).save_pretrained(scratch / "teacher")
    pipeline = load_encoders(scratch / "teacher")
    pipeline.register_modules(vae=build_vae("sd15").eval().requires_grad_(False))
    (scratch / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for k in range(images):
        small = Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(scratch / "pictures" / f"{k:02d}.jpg")
        (scratch / "pictures" / f"{k:02d}.txt").write_text(f"image {k}")
    data = Data(source=str(scratch / "pictures"))
    encoder = Encoder(pipeline, data, Sizes(data, teacher_size=(side, side), multiple=64))
    image_records = list(records(data.source))
    pixels = np.stack([cover(image_of(record, data), (side, side))[0] for record in image_records])
    bare = timed(lambda: encode_pixels(pipeline, pixels), 3)
    whole = timed(lambda: encoder.encode(image_records, first=0), 3)
    return {"pictures": images, "side": side, "seconds": round(whole, 3), "ratio": round(whole / bare, 3)}


def bench_host(iterations: int) -> dict:
    """Milliseconds that Python takes for SDXL's modules: a role switch, forward passes, and a student's update pass with and
    without recomputation."""
    few = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "attention_head_dim": (1, 2, 2)}
    few |= {"cross_attention_dim": 16, "sample_size": 8, "addition_time_embed_dim": 8}
    few |= {"projection_class_embeddings_input_dim": 24 + 6 * 8}
    unet = UNet2DConditionModel(**(unet_config("sdxl") | few)).eval().requires_grad_(False)
    network = SharedNetwork.with_student_and_teacher(unet, rank=4, seed=0, gradient_checkpointing=True)
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.zeros(1, 6)}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), Conditioning(torch.randn(1, 8, 16), added))

    def forward(adapter: str | None) -> None:
        with torch.no_grad(), network.using(adapter):
            network.ask(*inputs)

    def update_pass() -> None:
        with network.using(STUDENT):
            network.ask(*inputs).square().mean().backward()

    def switches() -> None:
        for _ in range(1000):
            with network.using(TEACHER):
                pass

    found = {
        "modules": sum(1 for _ in unet.modules()),
        "switch_ms": round(timed(switches, 3), 5),  # of 1000 in seconds, so of one in milliseconds
        "base_forward_ms": round(1000 * timed(lambda: forward(None), iterations), 1),
        "lora_forward_ms": round(1000 * timed(lambda: forward(STUDENT), iterations), 1),
        "recomputed_pass_ms": round(1000 * timed(update_pass, iterations), 1),
    }
    unet.disable_gradient_checkpointing()
    return found | {"pass_ms": round(1000 * timed(update_pass, iterations), 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measures iteration time against bare U-Net passes, per phase."
    )
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
        waiting = bench_waiting(config, args.iterations)
        preparing = bench_preparing(Path(scratch))
    host = bench_host(args.iterations)
    for row in rows:
        print(
            f"{row['rung']:>10} {row['objective']:>7}  {row['iteration_seconds']:.3f} s an iteration, "
            f"{row['bare_seconds']:.3f} s bare passes, ratio {row['ratio']:.2f}"
        )
    waiting["loop_ratio"] = round(waiting["seconds_an_update"] / rows[1]["iteration_seconds"], 3)
    print(f"waiting for data: {waiting['share']:.2%} of an iteration")
    print(f"an update of the whole loop: {waiting['loop_ratio']:.2f} times its iteration alone")
    print(f"preparing: {preparing['ratio']:.2f} times the bare encoding of {preparing['pictures']} images")
    print("Python on SDXL's modules: " + ", ".join(f"{name} {value}" for name, value in host.items()))
    if args.output:
        results = {"environment": environment(), "rows": rows, "waiting": waiting, "preparing": preparing}
        results["host"] = host
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
