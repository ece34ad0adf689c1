"""What training gains per update in memory and in tensors, after it has warmed up: nothing, if nothing leaks."""

import gc

import numpy as np
import psutil
import torch

from stepdistill.config import Phase, RunConfig
from stepdistill.runtime import Runtime
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase import update

from .phases import phase_state

_WARM_UP = 10
_EVERY = 5  # updates between two looks


def leaks(config: RunConfig, updates: int) -> dict[str, dict[str, float]]:
    """By objective: bytes of the process and tensors gained per update, as the slope of a line through all looks."""
    return {objective: _slopes(config, objective, updates) for objective in ("mse", "single")}


def _slopes(config: RunConfig, objective: str, updates: int) -> dict[str, float]:
    phase = Phase(objective=objective, max_train_steps=10_000)
    runtime = Runtime()
    setup, state = phase_state(config, 1, phase, runtime)
    batches, process = MicroBatches(setup, runtime), psutil.Process()
    looks: list[tuple[int, int, int]] = []
    for number in range(_WARM_UP + updates + 1):
        if number >= _WARM_UP and number % _EVERY == 0:
            gc.collect()
            tensors = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
            looks.append((number, process.memory_info().rss, tensors))
        update(setup, state, batches, runtime)
    batches.close()
    at, memory, tensors_at = (np.array(column, dtype=float) for column in zip(*looks, strict=True))
    return {
        "updates": updates,
        "bytes_per_update": round(float(np.polyfit(at, memory, 1)[0])),
        "tensors_per_update": round(float(np.polyfit(at, tensors_at, 1)[0]), 4),
    }
