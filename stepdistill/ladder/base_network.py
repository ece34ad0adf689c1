"""Loads the base network for training: in the run's dtype and memory format, and in 8 or 4 bits if asked, but then only if
its output stays close to the original's."""

import logging
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import ConfigError, RunConfig
from stepdistill.models.network.kind import kind_of, load_network
from stepdistill.runtime import Runtime, release_memory
from stepdistill.teacher.facts import TeacherFacts

logger = logging.getLogger(__name__)
MAX_QUANTIZATION_ERROR = 0.05
"""Largest error of the quantised base model's output, relative to the original's, that is trained on. The shipped teacher
has, in bfloat16, 0.004 with int8, 0.006 with fp8 and 0.017 with nf4."""


def load_base(base: Path, config: RunConfig, runtime: Runtime) -> Any:
    """The base network on the device. ConfigError if its quantised form is too far from the original."""
    kind, dtype = config.training.base_quantization, runtime.weight_dtype
    original, facts = None, TeacherFacts.of_folder(base)
    if kind != "none":
        unet = load_network(base, dtype=dtype).to(runtime.device)
        original = _probe(unet, facts)
        del unet
        release_memory()
    unet = load_network(base, dtype=dtype, quantization=kind).to(runtime.device)
    if original is not None:
        error = float((_probe(unet, facts) - original).norm() / original.norm())
        if not error <= MAX_QUANTIZATION_ERROR:
            raise ConfigError(
                f"training.base_quantization: with {kind} the output of this model is {error:.1%} off; allowed: up to "
                f"{MAX_QUANTIZATION_ERROR:.0%}; fix: training.base_quantization=none"
            )
        logger.info("distill: the base model in %s: its output is %.2f %% off", kind, 100 * error)
    return unet.to(memory_format=torch.channels_last) if config.training.channels_last else unet


@torch.no_grad()
def _probe(network: Any, facts: TeacherFacts) -> torch.Tensor:
    """The network's output, in float32, for fixed random inputs at four timesteps."""
    kind, device, dtype = kind_of(network), network.device, network.dtype
    side = 8 * facts.size_multiple
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample = torch.randn(4, *facts.latent_shape((side, side)))
        conditioning = kind.random_conditioning(facts, 4, dtype=torch.float32)
    timesteps = torch.tensor([999, 749, 499, 249], device=device)
    return kind.ask(network, sample.to(device, dtype), timesteps, conditioning.to(device, dtype)).float()
