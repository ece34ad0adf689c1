"""Loads the base network for training: in the run's dtype and memory format, and in 8 or 4 bits if asked, but then only if
its output stays close to the original's."""

import logging
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import ConfigError, RunConfig
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of, load_network
from stepdistill.runtime import Runtime, release_memory

logger = logging.getLogger(__name__)
MAX_QUANTIZATION_ERROR = 0.05
"""Largest error of the quantised base model's output, relative to the original's, that is trained on. The shipped teacher
has, in bfloat16, 0.004 with int8, 0.006 with fp8 and 0.017 with nf4."""


def load_base(base: Path, config: RunConfig, runtime: Runtime) -> Any:
    """The base network on the device. ConfigError if its quantised form is too far from the original."""
    kind, dtype = config.training.base_quantization, runtime.weight_dtype
    original = None
    if kind != "none":
        unet = load_network(base, dtype=dtype).to(runtime.device)
        original = _probe(unet)
        del unet
        release_memory()
    unet = load_network(base, dtype=dtype, quantization=kind).to(runtime.device)
    if original is not None:
        error = float((_probe(unet) - original).norm() / original.norm())
        if not error <= MAX_QUANTIZATION_ERROR:
            raise ConfigError(
                f"training.base_quantization: with {kind} the output of this model is {error:.1%} off; allowed: up to "
                f"{MAX_QUANTIZATION_ERROR:.0%}; fix: training.base_quantization=none"
            )
        logger.info("distill: the base model in %s: its output is %.2f %% off", kind, 100 * error)
    return unet.to(memory_format=torch.channels_last) if config.training.channels_last else unet


@torch.no_grad()
def _probe(unet: Any) -> torch.Tensor:
    """The network's output, in float32, for fixed random inputs at four timesteps."""
    kind, draw = kind_of(unet), torch.Generator().manual_seed(0)
    device, dtype, config = unet.device, unet.dtype, unet.config
    side = 8 * 2 ** (len(config.block_out_channels) - 1)
    sample = torch.randn(4, config.in_channels, side, side, generator=draw).to(device, dtype)
    hidden = torch.randn(4, 77, config.cross_attention_dim, generator=draw).to(device, dtype)
    added = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(4, width, generator=draw).to(device, dtype)
        added["time_ids"] = torch.tensor(
            [[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * 4, device=device
        )
    timesteps = torch.tensor([999, 749, 499, 249], device=device)
    return kind.ask(unet, sample, timesteps, Conditioning(hidden, added)).float()
