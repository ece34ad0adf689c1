"""The training loop of one phase (batch, losses, backward pass, clipping, step, log), and its state between updates."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepdistill.config import Phase, Training
from stepdistill.data.batches import Batch
from stepdistill.errors import NonFiniteError
from stepdistill.models.discriminator import DiscriminatorState
from stepdistill.models.shared_network import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER, SharedNetwork
from stepdistill.run.log import PhaseProgress, TrainingLog
from stepdistill.runtime import Runtime, is_out_of_memory, release_memory
from stepdistill.training.balance import GradientBalance
from stepdistill.training.guard import AdversaryGuard, Trouble
from stepdistill.training.losses import Weights, learning_roles, losses_of, roles_of, summed
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.optim import MovingAverage, RoleOptimizer
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.samples import Samples
from stepdistill.training.self_teacher import SelfTeacher

_MAX_OVERFLOWS = 20  # of float16 in a row; each one halves the loss scale


class PhaseState:
    """Everything that a phase must remember between two updates. Batches, noise and what the
    teacher makes of them follow from the step's number, so a kept teacher sample is computed again.

    step             number of updates done
    overflows        float16 overflows in a row, up to the last update
    seconds          training time, without the previews
    teacher_samples  by the number of a micro-batch's first sample; None unless the phase reuses them (cached_updates)
    Also: the student's adapter, the critics, an optimiser for each, the measured norms of each objective's gradient,
    the student's moving average and the one that is its teacher, the loss scale.
    """

    def __init__(self, setup: PhaseSetup, runtime: Runtime) -> None:
        phase, training = setup.phase, setup.training
        self._setup, self._runtime = setup, runtime
        self.step, self.overflows, self.seconds = 0, 0, 0.0
        self.teacher_samples: dict[int, torch.Tensor] | None = {} if phase.cached_updates else None
        self.optimizers = optimizers_of(phase, training, setup.student.network, _rates(setup))
        self.guard = None if setup.discriminator is None else AdversaryGuard(setup, runtime)
        self.balance = None
        if phase.balance == "gradient":
            self.balance = GradientBalance(phase, setup.student.network.weights(STUDENT))
        self.self_teacher = None
        if phase.teacher == "ema":
            self.self_teacher = SelfTeacher(setup.student.network, decay=phase.teacher_decay)
        self.average = None
        if training.ema_decay > 0:
            self.average = MovingAverage(setup.student.network.weights(STUDENT), decay=training.ema_decay)

    @property
    def weights(self) -> Weights:
        """The factors of the student's losses in the next update, by the objective's kind."""
        if self.balance is not None:
            return self.balance.factors(self.step)
        return self._setup.phase.weights_at(self.step)

    @property
    def learning(self) -> dict[str, RoleOptimizer]:
        """The optimisers of the roles that learn in the next update."""
        return {role: self.optimizers[role] for role in learning_roles(self._setup.phase, self.step)}

    @property
    def measures_balance(self) -> bool:
        """Whether the next update measures the norms of the objectives' gradients."""
        return self.balance is not None and self.balance.measures(self.step)

    @property
    def adversary_scale(self) -> float:
        """The discriminator's learning rate as a fraction of the configured one."""
        configured = _rates(dataclasses.replace(self._setup, adversary_scale=1.0))[DISCRIMINATOR]
        return self.optimizers[DISCRIMINATOR].base_rate / configured

    def after_step(self) -> None:
        """Averages the student's weights after an update of them."""
        for average in (self.average, self.self_teacher):
            if average is not None:
                average.update()

    def close(self) -> None:
        """Frees the gradients; the weights stay."""
        for optimizer in self.optimizers.values():
            optimizer.close()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state: numbers, and tensors by name."""
        discriminator = self._setup.discriminator
        learned = None if discriminator is None else discriminator.state()
        return copied(
            {
                "step": self.step,
                "overflows": self.overflows,
                "seconds": self.seconds,
                "student": self._setup.student.network.adapter_state(STUDENT),
                "discriminator": None if learned is None else vars(learned),
                "fake_score": None if self._setup.scores is None else self._setup.scores.state(),
                "optimizers": {role: o.state_dict() for role, o in self.optimizers.items()},
                "guard": None if self.guard is None else self.guard.state_dict(),
                "balance": None if self.balance is None else self.balance.state_dict(),
                "self_teacher": None if self.self_teacher is None else self.self_teacher.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "loss_scale": self._runtime.loss_scale_state(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state_dict` of a phase with the same setup; ValueError if parts, names or shapes differ."""
        _check_parts(state, self.state_dict())
        self._setup.student.network.load_adapter_state(STUDENT, state["student"])
        if self._setup.discriminator is not None:
            self._setup.discriminator.load_state(DiscriminatorState(**state["discriminator"]), strict=True)
        if self._setup.scores is not None:
            self._setup.scores.load_state(state["fake_score"])
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copied(state["optimizers"][role]))
        if self.guard is not None:
            self.guard.load_state_dict(state["guard"])
            rate = _rates(self._setup)[DISCRIMINATOR]
            self.optimizers[DISCRIMINATOR].set_base_rate(min(rate, self.optimizers[DISCRIMINATOR].base_rate))
        if self.balance is not None:
            self.balance.load_state_dict(copied(state["balance"]))
        if self.self_teacher is not None:
            self.self_teacher.load_state_dict(state["self_teacher"])
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
    after_update: Callable[[PhaseState, Trouble | None], None] = lambda _state, _trouble: None,
    track: Callable[[int, Mapping[str, float]], None] = lambda _step, _numbers: None,
) -> None:
    """Trains the student in place. NonFiniteError, before updating, if a loss or gradient is not finite, and at the end if
    the student's loss is not. OutOfMemoryError if not even micro-batches of one sample fit.

    start: a `PhaseState.state_dict` to continue from; default: the phase's first update.
    after_update: called between two updates, after the update's line is in the log, with what the guard of an adversarial
        phase found wrong, or None.
    track: called with the number of each update, counted from 1, and its numbers.
    """
    phase, training = setup.phase, setup.training
    batch_size = training.train_batch_size * training.gradient_accumulation_steps * runtime.num_processes
    with (
        contextlib.closing(_begun(setup, runtime, start)) as state,
        contextlib.closing(MicroBatches(setup, runtime, first_step=state.step)) as batches,
        PhaseProgress(
            setup.title, phase.max_train_steps, logging_steps=training.logging_steps, enabled=runtime.is_main
        ) as progress,
    ):
        while state.step < phase.max_train_steps:
            started = time.monotonic()
            numbers = update(setup, state, batches, runtime)
            seconds = time.monotonic() - started
            state.seconds += seconds
            numbers["images_per_second"] = batch_size / seconds
            trouble = None if state.guard is None else state.guard.watch(state.step, numbers)
            if log is not None:
                log.write(_line(setup, state.step - 1, numbers))
            track(state.step, numbers)
            after_update(state, trouble)
            progress.update(state.step, _for_console(numbers))
            is_last = state.step == phase.max_train_steps  # its preview comes at the end of the phase
            if training.preview_steps and state.step % training.preview_steps == 0 and not is_last:
                setup.preview(f"phase{setup.number}-{phase.title}-step{state.step:06d}", state.step)
            _park_idle(setup)  # the guard and previews may have asked the teacher
        if state.average is not None:
            state.average.copy_to_parameters()
        check_result(setup, state, batches, runtime)
    setup.preview(f"phase{setup.number}-{phase.title}-end", phase.max_train_steps)


def _begun(setup: PhaseSetup, runtime: Runtime, start: Mapping[str, Any] | None) -> PhaseState:
    """The phase's state before its first update, or the one to continue from."""
    state = PhaseState(setup, runtime)
    if start is not None:
        state.load_state_dict(start)
    elif state.guard is not None:
        state.guard.begin()
    _park_idle(setup)
    return state


def _park_idle(setup: PhaseSetup) -> None:
    """Takes the LoRA of earlier rungs off the GPU in a phase whose losses do not need the teacher."""
    if not setup.phase.asks_teacher:
        setup.student.network.park(TEACHER)


def _line(setup: PhaseSetup, step: int, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The log's line of an update, counted from 0."""
    place = {"rung": setup.rung.student_steps, "phase": setup.number, "objective": setup.phase.title}
    return {**place, "step": step, **numbers}


def update(setup: PhaseSetup, state: PhaseState, batches: MicroBatches, runtime: Runtime) -> dict[str, float]:
    """One update on the next micro-batches; returns its numbers for the log.

    With float16, an overflow of the scaled gradients skips the update, up to _MAX_OVERFLOWS times in a row. Any other loss
    or gradient that is not finite raises NonFiniteError, and nothing is updated.
    """
    means, waited = _accumulate_in_memory(setup, state, batches, runtime)
    learning = state.learning
    if state.balance is not None and state.measures_balance:
        means |= state.balance.combine(state.step, runtime)
    if setup.phase.changes_weights and STUDENT in learning:
        means |= {
            f"{kind}_weight": weight * torch.ones((), device=runtime.device)
            for kind, weight in state.weights.items()
        }
    for role, optimizer in learning.items():
        runtime.average_gradient(optimizer.weights.master)
        runtime.unscale([optimizer.optimizer])
        means[f"{role}_grad_norm"] = optimizer.clip(setup.training.max_grad_norm)
    numbers = _read(runtime.average_scalars(means)) | {"data_seconds": waited}
    numbers |= {f"{role}_lr": optimizer.learning_rate for role, optimizer in learning.items()}
    overflowed = runtime.may_overflow and _overflowed(numbers)
    if overflowed:
        state.overflows += 1
    elif STUDENT in learning:  # else one of the critics alone tells nothing of the student's next gradient
        state.overflows = 0
    if overflowed and state.overflows <= _MAX_OVERFLOWS:
        numbers = {name: value for name, value in numbers.items() if abs(value) < float("inf")}
        numbers["overflowed"] = 1.0
    else:
        _stop_if_not_finite(setup, state.step, numbers)
        for optimizer in learning.values():
            optimizer.step()
        if STUDENT in learning:
            state.after_step()
    runtime.adapt_scale()
    state.step += 1
    return numbers | runtime.peak_memory()


def _samples(setup: PhaseSetup, state: PhaseState, first: int, batch: Batch) -> Samples:
    """The samples of a micro-batch, which are computed when a loss needs them."""
    learns = setup.phase.student_learns_at(state.step)
    return Samples(
        batch,
        student=setup.student if learns else dataclasses.replace(setup.student, trains=False),
        teacher=setup.teacher,
        discriminator=setup.discriminator,
        scores=setup.scores,
        teacher_samples=state.teacher_samples,
        number=first,
        taps=setup.phase.taps,
    )


def losses_and_gradients(
    samples: Samples,
    phase: Phase,
    backward: Callable[..., None],
    *,
    weights: Weights | None = None,
    roles: Sequence[str] | None = None,
    after_each: Callable[[str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Computes the loss of each role and at once its backward pass, so that a role's graph is freed before the next one's.

    Returns losses and metrics, detached, by their names in the log.

    backward: takes a scalar loss and, if `after_each` is given, retain_graph.
    weights: factors of the student's losses by the objective's kind; default: those of the phase's first update.
    roles: those that learn in this update; default: all of the phase's.
    after_each: called with the kind of each objective of the student after a backward pass of that loss alone, without its
        weight; default: one backward pass of the weighted sum.
    """
    scalars: dict[str, torch.Tensor] = {}
    for role in roles_of(phase) if roles is None else roles:
        losses = losses_of(role, samples, phase)
        total = summed(role, losses, weights or phase.weights_at(0))
        if role == STUDENT and after_each is not None:
            last = list(losses)[-1]
            for kind, loss in losses.items():
                backward(loss.value, retain_graph=kind != last)
                after_each(kind)
        else:
            backward(total.value)
        scalars |= {f"{role}_loss": total.value.detach()} | total.metrics
        del losses, total
    return scalars


def optimizers_of(
    phase: Phase, training: Training, network: SharedNetwork, rates: Mapping[str, float]
) -> dict[str, RoleOptimizer]:
    """The optimiser of each role that learns in a phase; rates: the learning rates by role."""
    return {
        role: RoleOptimizer(
            network.weights(role),
            learning_rate=rate,
            adversarial=phase.adversary is not None,
            max_train_steps=phase.student_updates if role == STUDENT else phase.max_train_steps,
            lr_warmup_steps=training.lr_warmup_steps,
            lr_final_fraction=training.lr_final_fraction,
            kind=training.optimizer,
        )
        for role, rate in rates.items()
    }


def _rates(setup: PhaseSetup) -> dict[str, float]:
    """The learning rates by role."""
    rates = {STUDENT: setup.phase.learning_rate}
    if setup.discriminator is not None:
        rate = setup.phase.discriminator.learning_rate or setup.phase.learning_rate
        rates[DISCRIMINATOR] = setup.adversary_scale * rate
    if setup.scores is not None:
        rates[FAKE_SCORE] = setup.phase.fake_score_learning_rate or setup.phase.learning_rate
    return rates


def _accumulate_in_memory(
    setup: PhaseSetup, state: PhaseState, batches: MicroBatches, runtime: Runtime
) -> tuple[dict[str, torch.Tensor], float]:
    """`_accumulate`, repeated with the same samples in smaller micro-batches as long as a process runs out of memory."""
    while True:
        result = None
        try:
            result = _accumulate(setup, state, batches, runtime)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the except clause, whose error would keep the tensors of the failed pass alive
        if not runtime.largest(int(result is None)):
            assert result is not None
            return result
        del result
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        if state.teacher_samples is not None:
            state.teacher_samples.clear()  # their numbers are those of the larger micro-batches
        release_memory()
        batches.split(state.step)


def _accumulate(
    setup: PhaseSetup, state: PhaseState, batches: MicroBatches, runtime: Runtime
) -> tuple[dict[str, torch.Tensor], float]:
    """Runs the backward passes over this process's micro-batches of one update.

    Returns the means of losses and metrics, and the seconds spent waiting for the micro-batches.
    """
    sums: dict[str, torch.Tensor] = {}
    waited, weights, after_each = 0.0, state.weights, None
    if state.balance is not None and state.measures_balance:
        state.balance.begin()
        after_each = state.balance.collect

    def backward(loss: torch.Tensor, **options: bool) -> None:
        runtime.backward(loss / batches.per_update, **options)

    for optimizer in state.optimizers.values():
        optimizer.zero_grad()
    for _ in range(batches.per_update):
        asked = time.monotonic()
        first, batch = next(batches)
        waited += time.monotonic() - asked
        samples = _samples(setup, state, first, batch)
        scalars = losses_and_gradients(
            samples,
            setup.phase,
            backward,
            weights=weights,
            roles=tuple(state.learning),
            after_each=after_each,
        )
        for name, value in scalars.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / batches.per_update
    return sums, waited


def check_result(setup: PhaseSetup, state: PhaseState, batches: MicroBatches, runtime: Runtime) -> None:
    """NonFiniteError if the weights that the phase leaves give a loss that is not finite.

    Each update's loss shows whether the update before left finite weights; this is that test for the last one. It takes the
    samples that the next update would have, and changes nothing.
    """
    with torch.no_grad():
        samples = _samples(setup, state, *batches.one_of(setup.phase.max_train_steps))
        scalars = losses_and_gradients(samples, setup.phase, lambda _loss: None, weights=state.weights)
        numbers = _read(runtime.average_scalars(scalars))
    bad = _not_finite(numbers)
    if bad:
        raise NonFiniteError(
            f"rung {setup.title}, phase {setup.number}: the weights after its last update give {bad}; fix: the same "
            f"command with a lower learning_rate of this phase, now {setup.phase.learning_rate:g}"
        )


def _read(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The values of scalars on the device. An update makes the CPU wait for the device here, and with prodigy
    in its optimiser."""
    values = torch.stack([value.detach().double() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def _check_parts(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ValueError unless a state has the parts of this setup: optimisers, discriminator, average, teacher samples."""
    for name, part in expected.items():
        if (part is None) != (state.get(name) is None):
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
    bad = _not_finite(numbers)
    if bad:
        raise NonFiniteError(
            f"rung {setup.title}, phase {setup.number}, step {step}: {bad}; nothing was updated; fix: the same "
            f"command with a lower learning_rate of this phase, now {setup.phase.learning_rate:g}; or check the teacher's "
            f"weights and the latents"
        )


def _not_finite(numbers: Mapping[str, float]) -> str:
    """The numbers that are not finite, such as "student_loss = nan"; empty if there are none."""
    bad = {name: value for name, value in numbers.items() if not abs(value) < float("inf")}
    return ", ".join(f"{name} = {value}" for name, value in bad.items())


def _for_console(numbers: dict[str, float]) -> dict[str, float]:
    short = {
        "student_loss": "loss",
        "discriminator_loss": "D loss",
        "discriminator_accuracy_real": "D acc real",
        "discriminator_accuracy_student": "student",
        "images_per_second": "img/s",
    }
    return {label: numbers[name] for name, label in short.items() if name in numbers}
