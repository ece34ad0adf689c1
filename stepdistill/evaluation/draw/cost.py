"""What a row costs: seconds, images/s and memory at several batches. Owns psutil."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil
import torch

from stepdistill.evaluation.draw.rows import Row
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.plan import COST_REPEATS

_MIB = 2**20


class PeakMemory:
    """Peak memory inside a `with`, in MiB: what CUDA has allocated, or on the CPU the process's resident set, looked at
    a hundred times a second."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.mib = 0.0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
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
    """Seconds at the smallest batch, and the batch with the most images a second; a batch that does not fit ends it.

    Each batch is drawn twice and the faster one counts, so the first call's compilation does not.
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
