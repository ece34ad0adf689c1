"""The training loop of diffusers' LCM-LoRA script against this package's machinery: one loss, one batch, one network.

The plain loop does what the script does: two U-Nets, LoRA by peft with float32 weights, autocast if the base is in half
precision, one pass of the teacher with the prompt and one without, AdamW, and gradients clipped to 1. Ours has one network
with adapters, the same loss (eval/peers/lcm.py), and the optimiser of training.
"""

import statistics
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from peers.lcm import NODES, Model, consistency_loss
from peft import LoraConfig

from stepdistill.config import RunConfig
from stepdistill.data.batches import Batch, draw_batch
from stepdistill.diffusion.solver import guide
from stepdistill.ladder import Shared, load_shared
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT
from stepdistill.runtime import Runtime
from stepdistill.training.optim import RoleOptimizer

from .clock import medians, rounds

_RATE = 1e-4


def lcm_loop(config: RunConfig, count: int) -> list[dict[str, object]]:
    """A row per precision: seconds of an update of both loops, and the ratio of ours to the plain one."""
    return [_compared(config, precision, count) for precision in ("no", "bf16")]


def _compared(config: RunConfig, precision: str, count: int) -> dict[str, object]:
    shared = load_shared(config, Runtime(mixed_precision=precision))
    batch = draw_batch(
        shared.cache,
        list(range(config.training.train_batch_size)),
        noise_path=shared.noise_path,
        student_steps=NODES,
        node_steps=NODES,
        seed=0,
        keys=("bench",),
        dtype=shared.runtime.weight_dtype,
    ).to(shared.runtime.device)
    timed = rounds({"ours": _ours(shared, batch), "plain": _plain(config, shared, batch)}, count)
    return {
        "mixed_precision": precision,
        "batch": len(batch.noise),
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in medians(timed).items()},
        "ratio": round(statistics.median(each["ours"] / each["plain"] for each in timed), 3),
    }


def _loss(shared: Shared, batch: Batch, student: Model, teacher: Model) -> torch.Tensor:
    return consistency_loss(
        student,
        student,
        teacher,
        shared.noise_path.add_noise(batch.original_samples, batch.noise, batch.timesteps),
        batch.timesteps,
        noise_path=shared.noise_path,
        prediction_type=shared.undistilled.prediction_type,
    )


def _ours(shared: Shared, batch: Batch) -> Callable[[], None]:
    teacher = shared.undistilled
    student = Denoiser(shared.network, STUDENT, shared.noise_path, teacher.prediction_type, trains=True)
    optimizer = RoleOptimizer(
        shared.network.weights(STUDENT),
        learning_rate=_RATE,
        adversarial=False,
        max_train_steps=10_000,
        lr_warmup_steps=1,
        lr_final_fraction=1.0,
        kind="adamw",
    )

    def output(denoiser: Denoiser) -> Model:
        return lambda sample, timesteps: denoiser.output(sample, timesteps, batch.conditioning)

    def update() -> None:
        _loss(shared, batch, output(student), output(teacher)).backward()
        optimizer.clip(1.0)
        optimizer.step()

    return update


def _plain(config: RunConfig, shared: Shared, batch: Batch) -> Callable[[], None]:
    runtime, guidance = shared.runtime, config.teacher.guidance_scale
    teacher_unet, unet = _two_unets(config, shared)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    unconditional = shared.undistilled.unconditional
    assert unconditional is not None
    no_prompt = unconditional.beside(batch.conditioning)

    def output(network: UNet2DConditionModel, conditioning: Conditioning) -> Model:
        hidden, added = conditioning.encoder_hidden_states, conditioning.added_cond_kwargs

        def ask(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            inputs = (sample.to(runtime.weight_dtype), timesteps)
            return network(*inputs, encoder_hidden_states=hidden, added_cond_kwargs=added).sample.float()

        return ask

    def teacher(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with_prompt = output(teacher_unet, batch.conditioning)(sample, timesteps)
        without_prompt = output(teacher_unet, no_prompt)(sample, timesteps)
        return guide(without_prompt, with_prompt, guidance)

    def update() -> None:
        is_half = runtime.weight_dtype != torch.float32
        with torch.autocast(runtime.device.type, runtime.weight_dtype, enabled=is_half):
            loss = _loss(shared, batch, output(unet, batch.conditioning), teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _two_unets(config: RunConfig, shared: Shared) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """A frozen U-Net, and one with a LoRA of peft's whose weights are float32."""
    teacher_unet, unet = (
        UNet2DConditionModel.from_pretrained(shared.base / "unet", dtype=shared.runtime.weight_dtype)
        .to(shared.runtime.device)
        .requires_grad_(False)
        for _ in range(2)
    )
    rank, targets = config.lora.rank, list(shared.network.kind.lora_targets)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return teacher_unet, unet
