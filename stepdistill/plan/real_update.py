"""Two real updates of every phase with random weights on this machine's device: what the plan is compared with.

The time is that of one micro-batch with one move of the teacher, and of the optimisers, in the second update.
"""

import gc
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.models.shared_network import TEACHER
from stepdistill.plan.budget import Keeps
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.plan.whole_run import PhaseCost, RunPlan, distinct_phases
from stepdistill.runtime import default_device
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.small_base import ladder_facts
from stepdistill.training.losses import roles_of
from stepdistill.training.phase import losses_and_gradients, optimizers_of
from stepdistill.training.samples import Samples

_EVERY = 0.02  # seconds between two looks at the memory of the process


@dataclass(frozen=True)
class MeasuredUpdate:
    """What an update took.

    peak     bytes: on a GPU those of tensors, on the CPU those of the process beyond its libraries
    seconds  of a micro-batch with one move of the teacher, and of the optimisers
    """

    peak: int
    seconds: float


class RealRun:
    """The network of a run with random weights on this machine's device."""

    def __init__(self, config: RunConfig, facts: TeacherFacts) -> None:
        self.device = default_device()
        self._before = psutil.Process().memory_info().rss
        self._config = config
        self._rehearsal = Rehearsal(
            config, ladder_facts(config, facts), device=str(self.device), is_real=True
        )

    def update(self, rung: Rung, phase: Phase, *, keeps: Collection[str] = ()) -> MeasuredUpdate:
        """Makes two updates of a phase; the first one compiles the blocks if training.compile is on."""
        network, training = self._rehearsal.network, self._config.training
        network.keep_activations(keeps)
        with torch.device(self.device), self._rehearsal.critics_of(phase) as critics:
            if not phase.asks_teacher:
                network.park(TEACHER)
            student, teacher = self._rehearsal.denoisers(rung, phase)
            batch = self._rehearsal.micro_batch(phase)
            optimizers = optimizers_of(phase, training, network, dict.fromkeys(roles_of(phase), 1e-4))
            for _ in range(2):
                with self._peak() as peak:
                    started = time.monotonic()
                    samples = Samples(
                        batch,
                        student=student,
                        teacher=teacher,
                        discriminator=critics[0],
                        scores=critics[1],
                        taps=phase.taps,
                    )
                    losses_and_gradients(samples, phase, torch.Tensor.backward)
                    del samples
                    for optimizer in optimizers.values():
                        optimizer.clip(training.max_grad_norm)
                        optimizer.step()
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds = time.monotonic() - started
            for optimizer in optimizers.values():
                optimizer.close()
        gc.collect()
        return MeasuredUpdate(peak[0], seconds)

    @contextmanager
    def _peak(self) -> Iterator[list[int]]:
        """Yields a list that holds the peak afterwards."""
        result: list[int] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield result
            result.append(torch.cuda.max_memory_allocated())
            return
        process, ended = psutil.Process(), threading.Event()
        most = [process.memory_info().rss]

        def look() -> None:
            while not ended.wait(_EVERY):
                most[0] = max(most[0], process.memory_info().rss)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield result
        finally:
            ended.set()
            watcher.join()
        result.append(most[0] - self._before)


def measured_phases(
    config: RunConfig, facts: TeacherFacts, plan: RunPlan, keeps: Keeps
) -> Iterator[tuple[PhaseCost, MeasuredUpdate]]:
    """Two real updates of each kind of phase of a plan. keeps: `kept_modules` of the config."""
    real = RealRun(config, facts)
    for number, cost in distinct_phases(plan):
        yield cost, real.update(cost.rung, cost.phase, keeps=keeps.get((cost.rung.student_steps, number), ()))
