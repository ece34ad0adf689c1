"""Peak memory and seconds of the shipped configs at full size, from two updates of every phase.

    python eval/full_size.py [--configs sd15 sd21_v sdxl sdxl_24gb] [--output eval/results/full_size] [key=value ...]

Measured, if there is a CUDA GPU: a pipeline with random weights in the shapes of the released model, a few images, and the
config's ladder with two updates per phase. Memory is torch's peak of allocated bytes.
Estimated, always: the same modules on the meta device. The estimate adds up parameters, gradients and Adam's moments, the
tensors that autograd keeps of each phase's forwards, and with gradient checkpointing the most that one recomputed module
keeps. It also covers a preview, for which the VAE moves from the CPU to the GPU and decodes one image at a time. The
working memory of kernels is not included.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from random_teacher import build, build_vae, unet_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepdistill import stages
from stepdistill.config import Phase, RunConfig
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.run.log import read_log
from stepdistill.runtime import WEIGHT_DTYPES, environment

GIB = 2**30
CONFIGS = {"sd15": "sd15", "sd21_v": "sd21_v", "sdxl": "sdxl", "sdxl_24gb": "sdxl"}
UPDATES = 2
_MASTER = 4 * 4  # bytes per trained parameter: the parameter, its gradient and Adam's two moments, in float32


def saved_bytes(run: Any) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass of `run()`. Parameters do not count."""
    bytes_by_storage: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            bytes_by_storage[StorageWeakRef(storage).cdata] = storage.nbytes()
            saved.append(tensor)
        return tensor

    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(bytes_by_storage.values())


class _Live(TorchDispatchMode):
    """While active, tracks the bytes of the storages of newly made tensors; `peak` is the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: Counter[int] = Counter()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = StorageWeakRef(storage).cdata, storage.nbytes()
        if not self._holders[place]:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._holders[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self._now -= size


class _Flash(torch.autograd.Function):
    """Attention with the memory of CUDA's fused kernels: queries, keys, values and output are kept, no attention matrix."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Replaces torch's attention by _Flash. On the meta device torch splits attention into its parts, which no GPU does."""
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: _Flash.apply(q, k, v)
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before


def largest_piece(network: SharedNetwork, run: Any) -> int:
    """The most bytes that autograd keeps of one checkpointed module while that module is recomputed."""
    sizes: list[int] = []

    def spy(module: torch.nn.Module, *args: Any) -> Any:
        result: list[Any] = []
        sizes.append(saved_bytes(lambda: result.append(module(*args))))
        return result[0]

    network.model.enable_gradient_checkpointing(spy)
    run()
    network.model.enable_gradient_checkpointing(network.checkpointed)
    return max(sizes)


def base_bytes(unet: UNet2DConditionModel, dtype: torch.dtype, quantization: str) -> int:
    """Bytes of the frozen base model. With int8, a linear layer's weights take a byte each, and a scale per row."""
    total = sum(p.numel() for p in unet.parameters()) * dtype.itemsize
    if quantization == "int8":
        for linear in (m for m in unet.modules() if isinstance(m, torch.nn.Linear)):
            total -= (linear.weight.numel() - linear.out_features) * dtype.itemsize - linear.weight.numel()
    return total


def estimate(config: RunConfig, family: str) -> dict[str, Any]:
    """Bytes of the config at full size, estimated on the meta device.

    Returns {"parts": bytes by part, "phases": {kind of phase: bytes by part that its update adds}}.
    """
    training, options = config.training, unet_config(family)
    dtype = WEIGHT_DTYPES[training.mixed_precision]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**options).to(dtype).eval().requires_grad_(False)
        base = base_bytes(unet, dtype, training.base_quantization)
        network = SharedNetwork.with_student_and_teacher(
            unet, rank=config.lora.rank, seed=0, gradient_checkpointing=training.gradient_checkpointing
        )
    student = sum(p.numel() for p in network.group(STUDENT).values())
    parts = {"base": base, "student": student * _MASTER, "teacher": student * 4}
    side, batch = options["sample_size"], training.train_batch_size
    phases: dict[str, Any] = {}
    for phase in {(p.title, p.discriminator): p for rung in config.ladder for p in rung.phases}.values():
        phases[phase.title] = _phase(network, phase, config, side=side, batch=batch, dtype=dtype)
    discriminator = max(phase.get("discriminator", 0) for phase in phases.values())
    phases["preview"] = {"discriminator": discriminator, **_preview(family, side)}
    return {"parts": parts, "phases": phases}


def _preview(family: str, side: int) -> dict[str, int]:
    """Bytes of the VAE in float32, and the peak of decoding one image."""
    with torch.device("meta"):
        vae = build_vae(family).eval().requires_grad_(False)
    with torch.no_grad(), _Live() as live:
        vae.decode(torch.empty(1, 4, side, side, device="meta"))
    return {"vae": sum(p.numel() for p in vae.parameters()) * 4, "one picture decoded": live.peak}


def _phase(
    network: SharedNetwork, phase: Phase, config: RunConfig, *, side: int, batch: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that an update of the phase adds, by part."""
    unet = network.model
    sample = torch.empty(batch, 4, side, side, device="meta", requires_grad=True)
    timesteps = torch.empty(batch, dtype=torch.int64, device="meta")
    conditioning = _conditioning(unet, batch)
    context = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def student() -> None:
        with context, network.using(STUDENT):
            network.ask(sample, timesteps, conditioning).float().square().mean()

    parts = {"student's activations": saved_bytes(student)}
    if config.training.gradient_checkpointing:
        parts["recomputed at once"] = largest_piece(network, student)
    if phase.adversary is not None:
        parts |= _discriminator(network, phase, config, conditioning, side=side, context=context)
    return parts


def _discriminator(
    network: SharedNetwork,
    phase: Phase,
    config: RunConfig,
    conditioning: Conditioning,
    *,
    side: int,
    context: torch.autocast,
) -> dict[str, int]:
    """Bytes of the discriminator, and of what autograd keeps of its two forwards: on real and student samples for its own
    loss, and on student samples for the student's loss."""
    options = phase.discriminator
    with torch.device("meta"):
        discriminator = Discriminator(
            network,
            trunk=options.trunk,
            heads=options.heads,
            paired=phase.adversary == "paired",
            rank=config.lora.rank,
            seed=0,
            sample_size=side,
            base=UNet2DConditionModel.from_config(network.model.config) if options.trunk == "full" else None,
        )

    def judge(conditions: Conditioning, *, trains: bool) -> None:
        samples = torch.empty(len(conditions), 4, side, side, device="meta", requires_grad=not trains)
        timesteps = torch.empty(len(conditions), dtype=torch.int64, device="meta")
        with context, discriminator.active(trains=trains):
            features = discriminator.features(samples, timesteps, conditions)
            context_features = [f.detach() for f in features] if discriminator.paired else None
            discriminator.logits(features, context_features)

    twice = Conditioning.concat(conditioning, conditioning)
    activations = saved_bytes(lambda: judge(twice, trains=True))
    activations += saved_bytes(lambda: judge(conditioning, trains=False))
    count = sum(p.numel() for p in discriminator.trained.values())
    discriminator.close()
    return {"discriminator": count * _MASTER, "discriminator's activations": activations}


def _conditioning(unet: UNet2DConditionModel, batch: int) -> Conditioning:
    hidden = torch.empty(batch, 77, unet.config.cross_attention_dim, device="meta", dtype=unet.dtype)
    if unet.config.addition_embed_type != "text_time":
        return Conditioning(hidden)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {
        "text_embeds": torch.empty(batch, width, device="meta", dtype=unet.dtype),
        "time_ids": torch.empty(batch, 6, device="meta"),
    }
    return Conditioning(hidden, added)


def measured(config_path: str, family: str, place: Path, overrides: list[str]) -> dict[str, Any]:
    """Peak bytes and seconds of the last update of every phase, by rung and objective. Needs CUDA."""
    build(family).to(torch.bfloat16).save_pretrained(place / "teacher", safe_serialization=True)
    (place / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for k in range(8):
        pixels = generator.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "pictures" / f"{k}.png")
        (place / "pictures" / f"{k}.txt").write_text("noise")
    config = load_config(
        config_path, [f"teacher.path={place / 'teacher'}", f"output_dir={place}", *overrides]
    )
    raw = resolved(config)
    raw["data"]["source"] = str(place / "pictures")
    raw["training"]["preview_steps"] = 0
    for phase in (phase for rung in raw["ladder"] for phase in rung["phases"]):
        phase["max_train_steps"] = UPDATES
    config = RunConfig.model_validate(raw)
    stages.prepare(config)
    stages.distill(config)
    size = config.training.train_batch_size * config.training.gradient_accumulation_steps
    return {
        f"{line['rung']} {line['objective']}": {
            "peak_bytes": line["peak_memory_bytes"],
            "seconds": round(size / line["images_per_second"], 3),
        }
        for line in read_log(config.run_dir / "log.jsonl")
    }


def table(results: dict[str, Any]) -> str:
    """Markdown tables of every config: the estimate by part and phase, and the measured peaks if they were measured."""
    lines = []
    for name, result in results.items():
        parts = result["estimate"]["parts"]
        lines += ["", f"| {name} | GiB |", "| --- | ---: |"]
        lines += [f"| {part} | {count / GIB:.2f} |" for part, count in parts.items()]
        for objective, more in result["estimate"]["phases"].items():
            lines += [f"| {objective}: {part} | {count / GIB:.2f} |" for part, count in more.items()]
            together = sum(parts.values()) + sum(more.values())
            lines.append(f"| **{objective}: together** | **{together / GIB:.2f}** |")
        for phase, peak in result.get("measured", {}).items():
            lines.append(
                f"| measured: {phase}, {peak['seconds']:.1f} s an update | {peak['peak_bytes'] / GIB:.2f} |"
            )
    return "\n".join(lines).strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Estimates and measures memory and seconds of the configs at full size."
    )
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=Path("eval/results/full_size"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    results: dict[str, Any] = {}
    for name in args.configs:
        path, family = f"configs/{name}.yaml", CONFIGS[name]
        with fused_attention():
            results[name] = {"estimate": estimate(load_config(path, args.overrides), family)}
        if torch.cuda.is_available():
            with tempfile.TemporaryDirectory() as place:
                results[name]["measured"] = measured(path, family, Path(place), args.overrides)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = {"environment": environment(), "overrides": args.overrides}
    args.output.with_suffix(".json").write_text(json.dumps(about | results, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
