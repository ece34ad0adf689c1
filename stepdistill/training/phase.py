"""The training loop of one phase (batch, losses, backward pass, clipping, step, log), and its state between updates."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill import rng
from stepdistill.config import Phase, Rung, Training
from stepdistill.data.batches import Batch, ahead, draw_batch
from stepdistill.data.cache import LatentCache
from stepdistill.errors import NonFiniteError
from stepdistill.models.adapters import adapter_state, load_adapter_state
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator, DiscriminatorState
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT
from stepdistill.run.log import PhaseProgress, TrainingLog
from stepdistill.runtime import Runtime
from stepdistill.training.losses import Losses, losses_of
from stepdistill.training.optim import MovingAverage, RoleOptimizer
from stepdistill.training.samples import Samples

_MOST_OVERFLOWS = 20  # of float16 in a row; each one halves the loss scale


@dataclass(frozen=True)
class PhaseSetup:
    """One phase of one rung, ready to run. `number` is its index in the rung; `preview(name)` writes a preview picture."""

    rung: Rung
    phase: Phase
    number: int
    training: Training
    seed: int
    student: Denoiser
    teacher: Denoiser
    discriminator: Discriminator | None
    cache: LatentCache
    preview: Callable[[str], None]

    @property
    def keys(self) -> tuple[rng.Key, ...]:
        """Keys that set this phase's random numbers apart from those of others."""
        return (self.rung.student_steps, self.number, self.phase.title)

    @property
    def title(self) -> str:
        """The phase's title in the progress display and in messages, such as "32 -> 8 mse"."""
        return f"{self.rung.teacher_steps} -> {self.rung.student_steps} {self.phase.title}"

    @property
    def teacher_steps(self) -> int:
        """Steps of the sampler whose moves the student learns to make in one."""
        return self.phase.teacher_steps or self.rung.teacher_steps


class PhaseState:
    """Everything that a phase must remember between two updates. Batches, noise and what the
    teacher makes of them follow from the step's number, so a kept teacher sample is computed again.

    step             number of updates done
    overflows        float16 overflows in a row, up to the last update
    seconds          training time, without the previews
    teacher_samples  by the number of a micro-batch's first sample; None unless the phase reuses them (cached_updates)
    Also: the student's adapter, the discriminator, an optimiser for each, the student's moving average, the loss scale.
    """

    def __init__(self, setup: PhaseSetup, runtime: Runtime) -> None:
        phase, training = setup.phase, setup.training
        self._setup, self._runtime = setup, runtime
        self.step, self.overflows, self.seconds = 0, 0, 0.0
        self.teacher_samples: dict[int, torch.Tensor] | None = {} if phase.cached_updates else None
        self.optimizers = _optimizers(setup)
        self.average = None
        if training.ema_decay > 0:
            self.average = MovingAverage(setup.student.network.group(STUDENT), decay=training.ema_decay)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state: numbers, and tensors by name."""
        discriminator = self._setup.discriminator
        learned = None if discriminator is None else discriminator.state()
        return copied(
            {
                "step": self.step,
                "overflows": self.overflows,
                "seconds": self.seconds,
                "student": adapter_state(self._setup.student.network.model, STUDENT),
                "discriminator": None if learned is None else vars(learned),
                "optimizers": {role: o.state_dict() for role, o in self.optimizers.items()},
                "average": None if self.average is None else self.average.state_dict(),
                "loss_scale": self._runtime.loss_scale_state(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state_dict` of a phase with the same setup; ValueError if parts, names or shapes differ."""
        _check_parts(state, self.state_dict())
        load_adapter_state(self._setup.student.network.model, STUDENT, state["student"])
        if self._setup.discriminator is not None:
            self._setup.discriminator.load_state(DiscriminatorState(**state["discriminator"]), strict=True)
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copied(state["optimizers"][role]))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.overflows, self.seconds = state["step"], state["overflows"], state["seconds"]
        self._runtime.load_loss_scale_state(state["loss_scale"])


def run_phase(
    setup: PhaseSetup,
    *,
    runtime: Runtime,
    log: TrainingLog | None,
    start: Mapping[str, Any] | None = None,
    after_update: Callable[[PhaseState], None] = lambda _state: None,
) -> None:
    """Trains the student in place. Raises NonFiniteError, before updating, if a loss or gradient is not finite.

    start: a `PhaseState.state_dict` to continue from; default: the phase's first update.
    after_update: called between two updates, after the update's line is in the log.
    """
    phase, training = setup.phase, setup.training
    state = PhaseState(setup, runtime)
    if start is not None:
        state.load_state_dict(start)
    batch_size = training.train_batch_size * training.gradient_accumulation_steps * runtime.num_processes
    batches = batches_of(setup, runtime, first_step=state.step)
    with PhaseProgress(
        setup.title, phase.max_train_steps, logging_steps=training.logging_steps, enabled=runtime.is_main
    ) as progress:
        while state.step < phase.max_train_steps:
            started = time.monotonic()
            numbers = update(setup, state, batches, runtime)
            seconds = time.monotonic() - started
            state.seconds += seconds
            numbers["images_per_second"] = batch_size / seconds
            if log is not None:
                place = {
                    "rung": setup.rung.student_steps,
                    "phase": setup.number,
                    "objective": phase.title,
                }
                log.write({**place, "step": state.step - 1, **numbers})
            after_update(state)
            progress.update(state.step, _for_console(numbers))
            if training.preview_steps and state.step % training.preview_steps == 0:
                setup.preview(f"phase{setup.number}-{phase.title}-step{state.step:06d}")
    batches.close()
    if state.average is not None:
        state.average.copy_to_parameters()
    setup.preview(f"phase{setup.number}-{phase.title}-end")


def update(
    setup: PhaseSetup, state: PhaseState, batches: Iterator[tuple[int, Batch]], runtime: Runtime
) -> dict[str, float]:
    """One update on the next micro-batches; returns its numbers for the log.

    With float16, an overflow of the scaled gradients skips the update, up to _MOST_OVERFLOWS times in a row. Any other loss
    or gradient that is not finite raises NonFiniteError, and nothing is updated.
    """
    means, waited = _accumulate(setup, state, batches, runtime)
    for role, optimizer in state.optimizers.items():
        runtime.average_gradients(optimizer.parameters)
        runtime.unscale([optimizer.optimizer])
        means[f"{role}_grad_norm"] = optimizer.clip(setup.training.max_grad_norm)
    numbers = _read(runtime.average_scalars(means)) | {"data_seconds": waited}
    numbers |= {f"{role}_lr": optimizer.learning_rate for role, optimizer in state.optimizers.items()}
    state.overflows = state.overflows + 1 if runtime.may_overflow and _overflowed(numbers) else 0
    if 0 < state.overflows <= _MOST_OVERFLOWS:
        numbers = {name: value for name, value in numbers.items() if abs(value) < float("inf")}
        numbers["overflowed"] = 1.0
    else:
        _stop_if_not_finite(setup, state.step, numbers)
        for optimizer in state.optimizers.values():
            optimizer.step()
        if state.average is not None:
            state.average.update()
    runtime.adapt_scale()
    state.step += 1
    return numbers | runtime.peak_memory()


def batches_of(setup: PhaseSetup, runtime: Runtime, *, first_step: int = 0) -> Generator[tuple[int, Batch]]:
    """The micro-batches of this process from update first_step on, each with the global number of its first sample.

    On a GPU a thread draws them ahead into page-locked memory, and they are copied without waiting. On the CPU, a second
    thread that calls torch would get its own OpenMP pool: with more threads than cores, the main thread would then sleep at
    every barrier.
    """
    firsts = first_samples(setup, runtime, first_step=first_step)
    if runtime.device.type == "cpu":
        for first in firsts:
            yield first, _draw(setup, runtime, first)
        return
    with contextlib.closing(ahead(lambda first: _draw(setup, runtime, first).pinned(), firsts)) as drawn:
        for first, batch in drawn:
            yield first, batch.to(runtime.device)


def first_samples(setup: PhaseSetup, runtime: Runtime, *, first_step: int = 0) -> Iterator[int]:
    """The global number of the first sample of each micro-batch of this process, from update first_step on."""
    phase, training = setup.phase, setup.training
    parts = training.gradient_accumulation_steps
    for step in range(first_step, phase.max_train_steps):
        repeated = step % (phase.cached_updates or step + 1)
        first_part = (repeated * runtime.num_processes + runtime.process_index) * parts
        for part in range(first_part, first_part + parts):
            yield part * training.train_batch_size


def _draw(setup: PhaseSetup, runtime: Runtime, first: int) -> Batch:
    """The micro-batch that begins at global sample `first`."""
    phase, training, rung = setup.phase, setup.training, setup.rung
    return draw_batch(
        setup.cache,
        list(range(first, first + training.train_batch_size)),
        noise_path=setup.student.noise_path,
        student_steps=rung.student_steps,
        node_steps=rung.node_steps or rung.student_steps,
        teacher_steps=setup.teacher_steps if phase.needs_teacher_moves else None,
        perturbation_weights=None if phase.adversary is None else phase.discriminator.perturbation_weights,
        seed=setup.seed,
        keys=setup.keys,
        group=training.train_batch_size * training.gradient_accumulation_steps * runtime.num_processes,
        dtype=runtime.weight_dtype,
    )


def _losses(setup: PhaseSetup, state: PhaseState, runtime: Runtime, first: int, batch: Batch) -> Losses:
    """The losses of a micro-batch."""
    samples = Samples(
        batch,
        student=setup.student,
        teacher=setup.teacher,
        discriminator=setup.discriminator,
        teacher_samples=state.teacher_samples,
        number=first,
    )
    with runtime.autocast():
        return losses_of(samples, setup.phase)


def _optimizers(setup: PhaseSetup) -> dict[str, RoleOptimizer]:
    phase, training, network = setup.phase, setup.training, setup.student.network
    rates = {STUDENT: phase.learning_rate}
    if setup.discriminator is not None:
        rates[DISCRIMINATOR] = phase.discriminator.learning_rate or phase.learning_rate
    return {
        role: RoleOptimizer(
            network.group(role),
            learning_rate=rate,
            adversarial=setup.discriminator is not None,
            max_train_steps=phase.max_train_steps,
            lr_warmup_steps=training.lr_warmup_steps,
            lr_final_fraction=training.lr_final_fraction,
        )
        for role, rate in rates.items()
    }


def _accumulate(
    setup: PhaseSetup, state: PhaseState, batches: Iterator[tuple[int, Batch]], runtime: Runtime
) -> tuple[dict[str, torch.Tensor], float]:
    """Runs the backward passes over this process's next micro-batches.

    Returns the means of losses and metrics, and the seconds spent waiting for the micro-batches.
    """
    count = setup.training.gradient_accumulation_steps
    sums: dict[str, torch.Tensor] = {}
    waited = 0.0
    for optimizer in state.optimizers.values():
        optimizer.zero_grad()
    for _ in range(count):
        asked = time.monotonic()
        first, batch = next(batches)
        waited += time.monotonic() - asked
        losses = _losses(setup, state, runtime, first, batch)
        for loss in losses.by_role.values():
            runtime.backward(loss / count)
        named = {f"{role}_loss": loss.detach() for role, loss in losses.by_role.items()} | losses.metrics
        for name, value in named.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / count
    return sums, waited


def _read(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The values of scalars on the device. An update makes the CPU wait for the device only here."""
    values = torch.stack([value.detach().double() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def _check_parts(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ValueError unless a state has the parts of this setup: optimisers, discriminator, average, teacher samples."""
    for name, part in expected.items():
        if name not in state or (part is None) != (state[name] is None):
            has = "lacks" if state.get(name) is None else "has"
            raise ValueError(f"the phase's state {has} {name}: it belongs to a phase with other settings")
    roles, others = expected["optimizers"].keys(), state["optimizers"].keys()
    if roles != others:
        raise ValueError(
            f"the phase's state has optimisers for {', '.join(others)}, this phase needs {', '.join(roles)}"
        )


def copied(value: Any) -> Any:
    """Copies nested mappings and lists, with each tensor moved to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [copied(part) for part in value]
    return value


def _overflowed(numbers: dict[str, float]) -> bool:
    """Whether all losses are finite and a gradient is not, which a scaled loss leads to now and then."""
    bad = {name for name, value in numbers.items() if not abs(value) < float("inf")}
    return bool(bad) and all(name.endswith("_grad_norm") for name in bad)


def _stop_if_not_finite(setup: PhaseSetup, step: int, numbers: dict[str, float]) -> None:
    bad = {name: value for name, value in numbers.items() if not abs(value) < float("inf")}
    if bad:
        named = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"rung {setup.title}, phase {setup.number}, step {step}: {named}; nothing was updated. "
            f"Lower ladder's learning_rate for this phase, or check the teacher's weights and the latents."
        )


def _for_console(numbers: dict[str, float]) -> dict[str, float]:
    short = {
        "student_loss": "loss",
        "discriminator_loss": "D loss",
        "discriminator_accuracy_real": "D acc real",
        "discriminator_accuracy_student": "student",
        "images_per_second": "img/s",
    }
    return {label: numbers[name] for name, label in short.items() if name in numbers}
