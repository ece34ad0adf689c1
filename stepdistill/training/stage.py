"""The loop of one phase: batches, losses, guarded updates, log, EMA, previews."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel

from stepdistill import rng
from stepdistill.config import Phase, Rung, Training
from stepdistill.data.batches import Batch, ahead, draw_batch
from stepdistill.data.cache import LatentCache
from stepdistill.models.discriminator import Discriminator
from stepdistill.runtime import Runtime
from stepdistill.training.log import PhaseProgress, TrainingLog
from stepdistill.training.optim import NonFiniteError, RoleOptimizer
from stepdistill.training.steps import Denoisers, StepResult, phase_step

_MOST_OVERFLOWS = 20  # in a row, of float16: each halves the loss's scale


@dataclass(frozen=True)
class Stage:
    """One phase of one rung, ready to run. `number` is its place in the rung; `preview(step)` draws a picture."""

    rung: Rung
    phase: Phase
    number: int
    training: Training
    seed: int
    nets: Denoisers
    discriminator: Discriminator | None
    cache: LatentCache
    preview: Callable[[str], None]

    @property
    def keys(self) -> tuple[rng.Key, ...]:
        """What names this phase's randomness."""
        return (self.rung.student_steps, self.number, self.phase.objective)

    @property
    def title(self) -> str:
        """Such as "32 -> 8 mse"."""
        return f"{self.rung.teacher_steps} -> {self.rung.student_steps} {self.phase.objective}"


def run_stage(stage: Stage, *, runtime: Runtime, log: TrainingLog | None) -> None:
    """Trains the student in place. Raises NonFiniteError before an update on a loss or gradient that is not finite."""
    phase, training = stage.phase, stage.training
    roles = stage.nets.roles
    optimizers = _optimizers(stage)
    average = None
    if training.ema_decay > 0:
        average = EMAModel(roles.student_parameters, decay=training.ema_decay, foreach=True)
    batch_size = training.train_batch_size * training.gradient_accumulation_steps * runtime.num_processes
    known: dict[int, torch.Tensor] | None = {} if phase.cached_updates else None
    overflows = 0
    drawn = batches_of(stage, runtime)
    with PhaseProgress(
        stage.title, phase.max_train_steps, logging_steps=training.logging_steps, enabled=runtime.is_main
    ) as progress:
        for step in range(phase.max_train_steps):
            started = time.monotonic()
            numbers = _accumulate(stage, drawn, optimizers, runtime, known)
            numbers |= {f"{role}_lr": optimizer.learning_rate for role, optimizer in optimizers.items()}
            for role, optimizer in optimizers.items():
                runtime.average_gradients(optimizer.parameters)
                runtime.unscale([optimizer.optimizer])
                numbers[f"{role}_grad_norm"] = optimizer.clip(training.max_grad_norm).item()
            overflows = overflows + 1 if runtime.may_overflow and _overflowed(numbers) else 0
            if 0 < overflows <= _MOST_OVERFLOWS:
                numbers = {name: value for name, value in numbers.items() if abs(value) < float("inf")}
                numbers["overflowed"] = 1.0
            else:
                _stop_if_not_finite(stage, step, numbers)
                for optimizer in optimizers.values():
                    optimizer.step()
                if average is not None:
                    average.step(roles.student_parameters)
            runtime.adapt_scale()
            numbers |= runtime.peak_memory()
            numbers["images_per_second"] = batch_size / (time.monotonic() - started)
            if log is not None:
                log.write(
                    {
                        "rung": stage.rung.student_steps,
                        "phase": stage.number,
                        "objective": phase.objective,
                        "step": step,
                        **numbers,
                    }
                )
            progress.update(step + 1, _for_console(numbers))
            if training.preview_steps and (step + 1) % training.preview_steps == 0:
                stage.preview(f"phase{stage.number}-{phase.objective}-step{step + 1:06d}")
    drawn.close()
    if average is not None:
        average.copy_to(roles.student_parameters)
    stage.preview(f"phase{stage.number}-{phase.objective}-end")


def batches_of(stage: Stage, runtime: Runtime) -> Generator[tuple[int, Batch]]:
    """The micro-batches of this process in the order they are used, each with the global number of its first sample.

    On a GPU they are drawn ahead by a thread. On the CPU a second thread that calls torch has an OpenMP pool of its own, and
    with more threads than cores every barrier of the first sleeps.
    """
    firsts = first_samples(stage, runtime)
    if runtime.device.type == "cpu":
        return ((first, _draw(stage, runtime, first, stage.keys)) for first in firsts)
    return ahead(lambda first: _draw(stage, runtime, first, stage.keys), firsts)


def first_samples(stage: Stage, runtime: Runtime) -> Iterator[int]:
    """The global number of the first sample of each micro-batch of this process, in the order they are used."""
    phase, training = stage.phase, stage.training
    for step in range(phase.max_train_steps):
        update = step % (phase.cached_updates or step + 1)
        for part in range(training.gradient_accumulation_steps):
            place = (
                update * runtime.num_processes + runtime.process_index
            ) * training.gradient_accumulation_steps
            yield (place + part) * training.train_batch_size


def _draw(stage: Stage, runtime: Runtime, first: int, keys: tuple[rng.Key, ...]) -> Batch:
    """The micro-batch that begins at global sample `first` of the randomness named by `keys`."""
    return draw_batch(
        stage.cache,
        list(range(first, first + stage.training.train_batch_size)),
        student_steps=stage.rung.student_steps,
        node_steps=stage.rung.node_steps or stage.rung.student_steps,
        seed=stage.seed,
        keys=keys,
        group=stage.training.train_batch_size
        * stage.training.gradient_accumulation_steps
        * runtime.num_processes,
        device=runtime.device,
        dtype=runtime.weight_dtype,
        num_train_timesteps=stage.nets.schedule.num_train_timesteps,
    )


def _step(
    stage: Stage, runtime: Runtime, first: int, batch: Batch, known: dict[int, torch.Tensor] | None
) -> StepResult:
    """The losses on a micro-batch."""
    with runtime.autocast():
        return phase_step(
            stage.nets,
            batch,
            stage.phase,
            teacher_steps=stage.phase.teacher_steps or stage.rung.teacher_steps,
            discriminator=stage.discriminator,
            known=known,
            number=first,
        )


def _optimizers(stage: Stage) -> dict[str, RoleOptimizer]:
    phase, training = stage.phase, stage.training
    adversarial = phase.objective in ("paired", "single")
    roles = stage.nets.roles
    rates = {"student": (roles.student_parameters, phase.learning_rate)}
    if adversarial:
        rate = phase.discriminator.learning_rate or phase.learning_rate
        rates["discriminator"] = (roles.discriminator_parameters, rate)
    return {
        role: RoleOptimizer(
            parameters,
            learning_rate=rate,
            adversarial=adversarial,
            max_train_steps=phase.max_train_steps,
            lr_warmup_steps=training.lr_warmup_steps,
            lr_final_fraction=training.lr_final_fraction,
        )
        for role, (parameters, rate) in rates.items()
    }


def _accumulate(
    stage: Stage,
    drawn: Iterator[tuple[int, Batch]],
    optimizers: dict[str, RoleOptimizer],
    runtime: Runtime,
    known: dict[int, torch.Tensor] | None,
) -> dict[str, float]:
    """Backward over the micro-batches of this process; returns the means of losses and metrics, and data_seconds: how long
    it waited for them."""
    count = stage.training.gradient_accumulation_steps
    sums: dict[str, torch.Tensor] = {}
    waited = 0.0
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    for _ in range(count):
        asked = time.monotonic()
        first, batch = next(drawn)
        waited += time.monotonic() - asked
        result = _step(stage, runtime, first, batch, known)
        for loss in result.losses.values():
            runtime.backward(loss / count)
        named = {f"{role}_loss": loss.detach() for role, loss in result.losses.items()} | result.metrics
        for name, value in named.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / count
    return {name: value.item() for name, value in sums.items()} | {"data_seconds": waited}


def _overflowed(numbers: dict[str, float]) -> bool:
    """Losses finite, a gradient not: what scaling the loss leads to now and then."""
    bad = {name for name, value in numbers.items() if not abs(value) < float("inf")}
    return bool(bad) and all(name.endswith("_grad_norm") for name in bad)


def _stop_if_not_finite(stage: Stage, step: int, numbers: dict[str, float]) -> None:
    bad = {name: value for name, value in numbers.items() if not abs(value) < float("inf")}
    if bad:
        found = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"rung {stage.title}, phase {stage.number}, step {step}: {found}; nothing was updated. "
            f"Lower ladder's learning_rate for this phase, or check the teacher's weights and the latents."
        )


def _for_console(numbers: dict[str, float]) -> dict[str, float]:
    short = {
        "student_loss": "loss",
        "discriminator_loss": "D loss",
        "discriminator_accuracy_teacher": "D acc teacher",
        "discriminator_accuracy_student": "student",
        "images_per_second": "img/s",
    }
    return {label: numbers[name] for name, label in short.items() if name in numbers}
