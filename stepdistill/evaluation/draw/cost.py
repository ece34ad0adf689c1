"""Measures the cost of a row: seconds, images per second and memory at several batch sizes. Owns psutil."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil
import torch

from stepdistill.config.evaluation import COST_REPEATS
from stepdistill.evaluation.draw.rows import Row
from stepdistill.evaluation.draw.sampler import Sampler

_MIB = 2**20


class PeakMemory:
    """Context manager that measures peak memory in MiB: CUDA's peak allocation, or on the CPU the process's largest resident
    set, sampled a hundred times a second."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.mib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.mib = torch.cuda.max_memory_allocated() / _MIB
        else:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.mib = max(self.mib, process.memory_info().rss / _MIB)
            if self._over.wait(0.01):
                return


def measure_cost(
    sampler: Sampler, row: Row, prompts: Sequence[str], *, batch_sizes: Sequence[int], device: torch.device
) -> dict[str, Any]:
    """Seconds and peak memory at the smallest batch size, and at the one with the most images per second.

    Each size is drawn COST_REPEATS times and the fastest draw counts, so warm-up is left out. Sizes are tried in ascending
    order until one runs out of memory; {} if even the smallest does.
    """
    measured: dict[int, tuple[float, float]] = {}
    for size in sorted(batch_sizes):
        chunk = [prompts[k % len(prompts)] for k in range(size)]
        try:
            with PeakMemory(device) as memory:
                seconds = min(_timed(sampler, row, chunk, device) for _ in range(COST_REPEATS))
        except torch.OutOfMemoryError:
            break
        measured[size] = (seconds, memory.mib)
    if not measured:
        return {}
    smallest = min(measured)
    best = max(measured, key=lambda size: size / measured[size][0])
    return {
        f"seconds_at_batch_{smallest}": measured[smallest][0],
        "images_per_second": best / measured[best][0],
        "best_batch": best,
        "peak_memory_mib": measured[best][1],
        "peak_memory_mib_at_smallest": measured[smallest][1],
        "smallest_batch": smallest,
    }


def _timed(sampler: Sampler, row: Row, prompts: list[str], device: torch.device) -> float:
    began = time.monotonic()
    sampler.draw(row, prompts, seed=0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began
