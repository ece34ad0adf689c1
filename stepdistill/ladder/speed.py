"""The speed of this machine, for the plan of a run."""

import time

import torch

from stepdistill.config import RunConfig
from stepdistill.data.cache import load_cache
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.runtime import Runtime
from stepdistill.teacher.source import teacher_folder


@torch.no_grad()
def seconds_per_forward(config: RunConfig) -> float:
    """Seconds per sample of a U-Net forward pass with a LoRA on this machine, at the training batch size; best of three."""
    runtime = Runtime(mixed_precision=config.training.mixed_precision)
    unet = load_network(
        teacher_folder(config),
        dtype=runtime.weight_dtype,
        quantization=config.training.base_quantization,
    ).to(runtime.device)
    network = SharedNetwork(unet)
    network.add_adapter(STUDENT, rank=config.lora.rank, seed=0)
    cache = load_cache(config)
    size, count = max(cache.sizes.items(), key=lambda item: item[1])
    samples = cache.samples(size, [k % count for k in range(config.training.train_batch_size)])
    sample = samples.latents.to(runtime.device)
    conditioning = samples.conditioning.to(runtime.device, runtime.weight_dtype)
    timesteps = torch.full((len(sample),), 500, device=runtime.device)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        with network.using(STUDENT):
            network.ask(sample, timesteps, conditioning)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return min(seconds) / len(sample)
