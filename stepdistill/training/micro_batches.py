"""The micro-batches of one process in a phase, in order; after out of memory the same samples in smaller ones.

An update's samples have consecutive global numbers: process p of P has the p-th part of them, in per_update micro-batches.
"""

import contextlib
import logging
from collections.abc import Generator, Iterator

from stepdistill.data.batches import Batch, ahead, draw_batch
from stepdistill.errors import OutOfMemoryError
from stepdistill.runtime import Runtime
from stepdistill.training.phase_setup import PhaseSetup

logger = logging.getLogger(__name__)


class MicroBatches:
    """Iterator of (global number of the first sample, micro-batch), from update first_step on.

    size        samples of a micro-batch
    per_update  micro-batches of an update
    """

    def __init__(self, setup: PhaseSetup, runtime: Runtime, *, first_step: int = 0) -> None:
        self._setup, self._runtime = setup, runtime
        self.size = setup.training.train_batch_size
        self.per_update = setup.training.gradient_accumulation_steps
        self._batches = self._from(first_step)

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> tuple[int, Batch]:
        return next(self._batches)

    def split(self, step: int) -> None:
        """Begins update number `step` again, with micro-batches of at most half the size; OutOfMemoryError if they have one
        sample already."""
        self.close()
        if self.size == 1:
            raise OutOfMemoryError(
                f"out of memory in {self._setup.title} after {step} updates, with one sample in a micro-batch; fix: "
                f"{self._remedy_here()}another run (name=...) with training.mixed_precision=bf16, "
                f"training.base_quantization=int8, or smaller images (data.resolution)"
            )
        smaller = next(size for size in range(self.size // 2, 0, -1) if self.size % size == 0)
        if self._runtime.is_main:
            logger.warning(
                "distill: out of memory with %d samples in a micro-batch; the update is repeated with %d; to begin with "
                "them: training.train_batch_size=%d training.gradient_accumulation_steps=%d",
                self.size,
                smaller,
                smaller,
                self.per_update * self.size // smaller,
            )
        self.per_update *= self.size // smaller
        self.size = smaller
        self._batches = self._from(step)

    def _remedy_here(self) -> str:
        """What lets the same run continue with less memory, if anything does."""
        training = self._setup.training
        if not training.gradient_checkpointing:
            setting = "training.gradient_checkpointing=true"
        elif training.memory_budget is not None:
            setting = f"a smaller training.memory_budget, now {training.memory_budget}, or null"
        else:
            return ""
        return f"the same command with {setting}, which continues there; or "

    def close(self) -> None:
        """Ends the thread that draws ahead."""
        self._batches.close()

    def firsts(self, step: int) -> Iterator[int]:
        """The global numbers of the first samples of this process's micro-batches in update number `step`."""
        runtime, cached = self._runtime, self._setup.phase.cached_updates
        repeated = step % (cached or step + 1)
        first_part = (repeated * runtime.num_processes + runtime.process_index) * self.per_update
        for part in range(first_part, first_part + self.per_update):
            yield part * self.size

    def _from(self, first_step: int) -> Generator[tuple[int, Batch]]:
        """The micro-batches from an update on.

        On a GPU a thread draws them ahead into page-locked memory, and they are copied without waiting. On the CPU, a second
        thread that calls torch would get its own OpenMP pool: with more threads than cores, the main thread would then sleep
        at every barrier.
        """
        steps = range(first_step, self._setup.phase.max_train_steps)
        firsts = (first for step in steps for first in self.firsts(step))
        if self._runtime.device.type == "cpu":
            for first in firsts:
                yield first, self._draw(first)
            return
        with contextlib.closing(ahead(lambda first: self._draw(first).pinned(), firsts)) as drawn:
            for first, batch in drawn:
                yield first, batch.to(self._runtime.device)

    def one_of(self, step: int) -> tuple[int, Batch]:
        """The first micro-batch of update number `step`, which may lie after the phase's last one."""
        first = next(self.firsts(step))
        return first, self._draw(first).to(self._runtime.device)

    def _draw(self, first: int) -> Batch:
        """The micro-batch that begins at global sample `first`."""
        setup = self._setup
        phase, rung = setup.phase, setup.rung
        return draw_batch(
            setup.cache,
            list(range(first, first + self.size)),
            noise_path=setup.student.noise_path,
            student_steps=rung.student_steps,
            node_steps=rung.node_steps or rung.student_steps,
            teacher_steps=setup.teacher_steps if phase.needs_teacher_moves else None,
            perturbation_weights=None
            if phase.adversary is None
            else phase.discriminator.perturbation_weights,
            for_scores=phase.matches_distributions,
            from_own=phase.inputs == "own",
            prompt_dropout=phase.prompt_dropout,
            seed=setup.seed,
            keys=setup.keys,
            group=self.size * self.per_update * self._runtime.num_processes,
            dtype=self._runtime.weight_dtype,
        )
