"""Tiny ladders that cover all training options, and the sha256 of the LoRAs that they produce.

    python tests/golden/cases.py WORK [--only NAME ...] [--output FILE]

Prints as JSON the commit, a hash of the CPU's kernels, and {case: {student_steps: sha256}}. Teachers and data are built in
WORK once; runs go into a temporary folder. A case is only a config, run through the command line, so this file works with
any commit of the package:
`PYTHONPATH=OTHER python tests/golden/cases.py WORK` (compare.py does that).
"""

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

Config = dict[str, Any]
FAMILIES = {"sd15": "sd15", "sd21_v": "sd21_v", "sdxl": "sdxl"}
# changed teachers: (family, options of the scheduler that differ)
CHANGED = {
    "sd15_x0": ("sd15", {"prediction_type": "sample"}),
    "sd15_zero_snr": ("sd15", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
}
SECONDS = 600
IMAGES = 24
UPDATES = 2
RATE = 1e-2  # so large that two updates move every weight


def phase(objective: str, **more: Any) -> Config:
    """A phase of two updates."""
    return {"objective": objective, "max_train_steps": UPDATES, "learning_rate": RATE, **more}


def several(*objectives: Config, **more: Any) -> Config:
    """A phase with several objectives."""
    return phase("mse", **more) | {"objective": None, "objectives": list(objectives)}


def adversarial(objective: str = "single", **options: Any) -> Config:
    """A phase with a discriminator."""
    return phase(objective, discriminator={"learning_rate": RATE, **options})


def rung(teacher_steps: int, student_steps: int, *phases: Config, **more: Any) -> Config:
    """One step reduction."""
    return {"teacher_steps": teacher_steps, "student_steps": student_steps, "phases": list(phases), **more}


def short(*phases: Config) -> list[Config]:
    """Guidance at 8 steps, then 8 -> 4 with these phases."""
    return [rung(8, 8, phase("mse")), rung(8, 4, *phases)]


def to_one_step(*phases: Config, **more: Any) -> list[Config]:
    """8 -> 2 by mse, then 2 -> 1 with these phases."""
    return [rung(8, 2, phase("mse")), rung(2, 1, *phases, **more)]


def base(teacher: str = "sd15", **training: Any) -> Config:
    """The config that all cases share, with a short ladder."""
    return {
        "name": "golden",
        "teacher": {"path": teacher, "guidance_scale": 3.0},
        "lora": {"rank": 4},
        "data": {"source": "pictures", "held_out": 0.0, "resolution": 64, "num_images": IMAGES},
        "training": {"train_batch_size": 2, **training},
        "preview": {"prompts": ["a wall"], "looks_images": 0},
        "ladder": short(phase("mse")),
    }


def with_ladder(ladder: list[Config], teacher: str = "sd15", **training: Any) -> Config:
    """A case with its own ladder."""
    return base(teacher, **training) | {"ladder": ladder}


def with_data(data: Config) -> Config:
    """A case with its own data options."""
    config = base()
    return config | {"data": config["data"] | data}


def cases() -> dict[str, Config]:
    """Every case by name."""
    mse, convert, single, paired = (
        phase("mse"),
        phase("convert"),
        adversarial("single"),
        adversarial("paired"),
    )
    by_name: dict[str, Config] = {
        "as printed": with_ladder(
            [
                rung(32, 8, mse),
                rung(8, 4, mse, paired, single),
                rung(4, 2, mse, paired, single, node_steps=4),
                rung(2, 1, convert, mse, paired, single, node_steps=4, prediction_type="sample"),
            ]
        ),
        "letters": base("letters") | {"data": {"source": "letters", "num_images": 40}},
        "guidance off": base() | {"teacher": {"path": "sd15", "guidance_scale": 1.0}},
        "zeros unconditional": base()
        | {"teacher": {"path": "sd15", "guidance_scale": 3.0, "unconditional": "zeros"}},
        "skip-level teacher": with_ladder([*short(mse), rung(4, 2, phase("mse", teacher_steps=8))]),
        "skip-level teacher, single": with_ladder(
            [*short(mse), rung(4, 2, mse, single | {"teacher_steps": 8})]
        ),
        "start_timestep": with_ladder(to_one_step(mse, single, start_timestep=399)),
        "start_timestep, paired": with_ladder(to_one_step(mse, paired, start_timestep=499)),
        "start_timestep, convert": with_ladder(
            to_one_step(convert, mse, start_timestep=399, prediction_type="sample")
        ),
        "convert to v": with_ladder(to_one_step(convert, single, prediction_type="v_prediction")),
        "node_steps": with_ladder(to_one_step(mse, single, node_steps=8)),
        "ema": with_ladder(short(mse, single), ema_decay=0.5),
        "cached updates": with_ladder(short(phase("mse", cached_updates=2) | {"max_train_steps": 4})),
        "four micro-batches": with_ladder(
            short(mse, paired), gradient_accumulation_steps=4, train_batch_size=1
        ),
        "checkpointing": with_ladder(short(mse, paired, single), gradient_checkpointing=True),
        "bf16": with_ladder(short(mse, paired, single), mixed_precision="bf16"),
        "bf16, full trunk": with_ladder(short(mse, adversarial(trunk="full")), mixed_precision="bf16"),
        "optimiser": with_ladder(
            short(mse, single), max_grad_norm=1e-3, lr_warmup_steps=0, lr_final_fraction=0.5
        ),
        "perturbation": with_ladder(
            [
                rung(8, 2, mse),
                rung(2, 1, adversarial("paired", perturbation_weights=[5.0, 1.0, 1.0, 1.0])),
            ]
        ),
        "prompts alone": with_data({"source": "prompts.txt", "teacher_steps": 4, "num_images": 8}),
        "buckets": with_data({"buckets": True, "min_per_bucket": 4}),
        "held out": with_data({"held_out": 0.67}),
        "cache in bfloat16": with_data({"dtype": "bfloat16"}),
    }
    for kind in ("l2", "attention", "gram", "kernel", "relations"):
        at = {"kind": kind, "taps": ["encoder", "middle", "decoder"]}
        by_name[f"features {kind}"] = with_ladder(short(several({"kind": "mse"}, at)))
    by_name["balanced"] = with_ladder(
        short(several({"kind": "mse"}, {"kind": "single", "final_weight": 0.1}, balance="gradient"))
    )
    by_name["own average as teacher"] = with_ladder(
        [*short(mse), rung(4, 2, mse, phase("mse", teacher="ema"))]
    )
    for space in ("prev_sample", "epsilon", "sample", "v_prediction", "truncated_snr", "auto"):
        by_name[f"loss_space {space}"] = with_ladder(short(phase("mse", loss_space=space)))
    for trunk in ("lora", "full", "frozen"):
        for objective in ("paired", "single"):
            by_name[f"{objective}, {trunk}"] = with_ladder(short(mse, adversarial(objective, trunk=trunk)))
    for heads, loss, real in (
        ("multi", "non_saturating", "teacher"),
        ("mid", "relativistic", "teacher"),
        ("mid", "non_saturating", "data"),
        ("multi", "relativistic", "data"),
    ):
        options = {"heads": heads, "loss": loss, "real": real}
        by_name[f"single, {heads}, {loss}, {real}"] = with_ladder(short(adversarial("single", **options)))
        by_name[f"paired, {heads}, {loss}, {real}"] = with_ladder(
            to_one_step(adversarial("paired", **options))
        )
    for trunk in ("lora", "full"):
        carried = adversarial("single", trunk=trunk, start="carried")
        by_name[f"carried, {trunk}"] = with_ladder(
            short(adversarial("paired", trunk=trunk), carried, carried)
        )
    for teacher in ("sd21_v", "sd15_x0", "sd15_zero_snr", "sdxl"):
        by_name[teacher] = with_ladder(short(mse, paired), teacher)
        by_name[f"{teacher}, one step"] = with_ladder(to_one_step(mse, single), teacher)
    by_name["sdxl, buckets"] = with_data({"buckets": True, "min_per_bucket": 4}) | {
        "teacher": {"path": "sdxl", "guidance_scale": 5.0}
    }
    by_name["sdxl, checkpointing"] = with_ladder(short(mse, single), "sdxl", gradient_checkpointing=True)
    by_name["two processes"] = with_ladder(short(mse, paired), gradient_accumulation_steps=2)
    return by_name


PROCESSES = {"two processes": 2}


def build_inputs(work: Path) -> None:
    """Builds the teachers, images and prompts that the cases use, if they are missing."""
    if (work / "prompts.txt").exists():
        return
    from eval.random_teacher import build

    work.mkdir(parents=True, exist_ok=True)
    for name, family in FAMILIES.items():
        build(family, tiny=True).save_pretrained(work / name)
    for name, (family, scheduler) in CHANGED.items():
        pipeline = build(family, tiny=True)
        pipeline.scheduler.register_to_config(**scheduler)
        pipeline.save_pretrained(work / name)
    _write_images(work / "pictures")
    (work / "prompts.txt").write_text("".join(f"a wall number {k}\n" for k in range(8)))


def _write_images(folder: Path) -> None:
    """Writes square, tall and wide images of noise, each with its caption."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for k in range(IMAGES):
        width, height = ((64, 64), (64, 96), (96, 64))[k % 3]
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(k))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{k:03d}.png")
        (folder / f"{k:03d}.txt").write_text(f"a wall number {k}")


def run_case(name: str, config: Config, work: Path, scratch: Path) -> dict[str, str]:
    """Prepares and distils one case; returns the sha256 of each rung's tensors by student steps."""
    config = copy.deepcopy(config) | {
        "output_dir": str(scratch),
        "name": name.replace(" ", "-").replace(",", ""),
    }
    if config["teacher"]["path"] != "letters":
        config["teacher"]["path"] = str(work / config["teacher"]["path"])
    if config["data"]["source"] != "letters":
        config["data"]["source"] = str(work / config["data"]["source"])
    path = scratch / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    for stage in ("prepare", "distill"):
        _stage(stage, path, PROCESSES.get(name, 1))
    rungs = sorted((scratch / config["name"] / "rungs").iterdir(), key=lambda folder: -int(folder.name))
    return {folder.name: digest(folder / "pytorch_lora_weights.safetensors") for folder in rungs}


def _stage(stage: str, config: Path, processes: int) -> None:
    if processes > 1:
        # the launcher's own interpreter, so that the children import the same commit
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        launch += ["-m", "stepdistill", stage, str(config)]
        completed = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=SECONDS)
        code, stderr = completed.returncode, completed.stderr[-3000:]
    else:
        from stepdistill.cli import app, guarded

        code, stderr = guarded(lambda: app([stage, str(config)])), ""
    if code:
        raise RuntimeError(f"{config.stem}: {stage} ended with {code}\n{stderr}")


def digest(file: Path) -> str:
    """sha256 of the tensors of a safetensors file. It does not depend on the file's metadata, which may change."""
    total = hashlib.sha256()
    for key, tensor in sorted(load_file(file).items()):
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def kernels() -> str:
    """A hash of results of this CPU's kernels for fixed inputs. Golden weights are comparable only if this hash is equal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 8, 8, generator=generator, requires_grad=True)
    weight = torch.randn(32, 16, 3, 3, generator=generator, requires_grad=True)
    linear = torch.randn(16, 32, generator=generator, requires_grad=True)
    hidden = torch.nn.functional.group_norm(torch.nn.functional.conv2d(x, weight, padding=1), 8)
    tokens = torch.nn.functional.silu(hidden).flatten(2).transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    half = torch.nn.functional.linear(attended.bfloat16(), linear.bfloat16()).float()
    loss = (torch.nn.functional.linear(attended, linear) + half).exp().mean()
    total = hashlib.sha256(torch.__version__.encode())
    for tensor in (loss, *torch.autograd.grad(loss, (x, weight, linear))):
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def commit_of_package() -> str:
    """The commit of the imported package."""
    import stepdistill

    folder = str(Path(stepdistill.__file__).parent)
    completed = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return completed.stdout.strip()


def all_digests(work: Path, only: list[str] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """Each case with the sha256 of its rungs. Runs on one thread, because sums depend on the number of threads."""
    torch.set_num_threads(1)
    build_inputs(work)
    all_cases = cases()
    for name in only or all_cases:
        with tempfile.TemporaryDirectory() as scratch:
            yield name, run_case(name, all_cases[name], work, Path(scratch))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints the sha256 of the LoRAs of tiny ladders.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(cases()))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    digests = dict(all_digests(args.work, args.only))
    text = json.dumps({"commit": commit_of_package(), "kernels": kernels(), "cases": digests}, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
