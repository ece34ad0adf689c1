"""One update of every phase on the meta device, with the code that trains: its memory, arithmetic and traffic on a GPU.

No weights are read and no GPU is needed. What depends on the number of the teacher's moves is computed for one move and
multiplied, because all its moves are alike and none of them keeps memory.
"""

import functools
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.config.sections import Quantization
from stepdistill.diffusion.noise_path import Move
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.experts import lora_of
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import build_network
from stepdistill.models.scores import Scores
from stepdistill.models.shared_network import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER, SharedNetwork
from stepdistill.plan.cards import Card
from stepdistill.plan.passes import own_moves, teacher_substeps
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.plan.tracker import Tracker, Work, gpu_kernels
from stepdistill.teacher.experts import lora_files
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.quantization import quantized_bytes
from stepdistill.teacher.small_base import ladder_facts
from stepdistill.training.losses import roles_of
from stepdistill.training.optim import RoleOptimizer
from stepdistill.training.phase import losses_and_gradients, optimizers_of
from stepdistill.training.samples import Samples

MOMENTS = {"adam": 8.0, "adamw": 8.0, "adam8bit": 2 + 8 / 256, "prodigy": 16.0}
"""Bytes per parameter that an optimiser keeps; adam8bit has a float32 scale for each moment and 256 parameters."""
_ACTIVATIONS = "activations"
OPTIMISER = "optimiser"
_OWN_MOVES = "own moves"
_REAL_SCORE = "real score"


@dataclass(frozen=True)
class UpdateCost:
    """What one update of a phase takes on one GPU.

    peak     bytes
    parts    bytes at the peak, by part; what is not a weight, a gradient or a moment counts as activations
    between  bytes that stay between two updates
    work     by role: "teacher", "student" and its "own moves", the critics, "real score" and "optimiser", of the whole
             update; the mean over updates with and without the student's
    micro    the work of one micro-batch with one move of the teacher, and of the optimisers
    """

    peak: int
    parts: dict[str, int]
    between: int
    work: dict[str, Work]
    micro: Work

    @property
    def total(self) -> Work:
        """The work of all roles."""
        return sum(self.work.values(), Work())


@dataclass(frozen=True)
class Segment:
    """A module whose activations are kept or computed again: its name, their bytes, and the FLOP to compute them."""

    name: str
    kept: int
    flop: float


class DryRun:
    """The network of a run on a device without values, on which each phase makes one update.

    Args:
        config: the run.
        facts: the teacher's configs.
        card: gives the time of each kernel.
        device: meta, or that of other tensors without values.
    """

    def __init__(self, config: RunConfig, facts: TeacherFacts, card: Card, *, device: str = "meta") -> None:
        self._rehearsal = Rehearsal(config, ladder_facts(config, facts), device=device)
        self._teachers = [facts] if config.shrink is not None and not config.teachers else []
        self._teachers += [
            TeacherFacts.of_folder(Path(expert.path).expanduser())
            for expert in config.teachers
            if expert.path is not None
        ]
        self._config, self._card, self._device = config, card, device
        self.network = self._rehearsal.network

    def update(self, rung: Rung, phase: Phase, *, keeps: Collection[str] = ()) -> UpdateCost:
        """What one update of this phase takes, if the activations of the modules named in `keeps` are not computed again."""
        self.network.keep_activations(keeps)
        with (
            torch.device(self._device),
            gpu_kernels(),
            self._rehearsal.critics_of(phase) as (discriminator, scores),
        ):
            cost = self._update(rung, phase, discriminator, scores)
        gc.collect()
        return cost

    def segments(self) -> list[Segment]:
        """The parts of a student's forward pass that gradient checkpointing computes again, in order."""
        names = {module: name for name, module in self.network.model.named_modules()}
        tracker, found = Tracker(self._card), list[Segment]()

        def spied(module: torch.nn.Module, *args: Any) -> Any:
            before, flop = tracker.now, sum(tracker.work.values(), Work()).flop
            output = module(*args)
            outputs = output if isinstance(output, tuple) else (output,)
            given = sum(out.untyped_storage().nbytes() for out in outputs if out is not None)
            kept = tracker.now - before - given
            found.append(Segment(names[module], kept, sum(tracker.work.values(), Work()).flop - flop))
            return output

        model = self.network.model
        model.enable_gradient_checkpointing(spied)
        with torch.device(self._device), gpu_kernels(), tracker, self.network.using(STUDENT):
            batch = self._rehearsal.inputs.micro_batch()
            _ = self.network.ask(batch.noise, batch.timesteps, batch.conditioning)
        model.enable_gradient_checkpointing(self.network.checkpointed)
        return found

    def _update(
        self, rung: Rung, phase: Phase, discriminator: Discriminator | None, scores: Scores | None
    ) -> UpdateCost:
        # other optimisers have other moments (MOMENTS) and about the same work
        traced = self._config.training.model_copy(update={"optimizer": "adam"})
        optimizers = optimizers_of(phase, traced, self.network, dict.fromkeys(roles_of(phase), 1e-4))
        for optimizer in optimizers.values():
            optimizer.step()  # makes the moments
        part = Parts(self.network, is_adversarial=phase.adversary is not None)
        student, teacher = self._rehearsal.denoisers(rung, phase)
        student = _OwnMoves.of(student, part)
        if scores is not None:
            scores = Scores(_RealScore.of(scores.real, part), scores.fake)
        batch = self._rehearsal.micro_batch(phase)
        samples = functools.partial(
            Samples,
            teacher=teacher,
            discriminator=discriminator,
            scores=scores,
            taps=phase.taps,
        )
        tracker = Tracker(self._card, label=part.current)
        self._hold(tracker, phase, optimizers)
        peak, parts = trace_update(
            tracker, part, phase, optimizers, lambda: samples(batch, student=student), self._config
        )
        work = self._whole(tracker.work, rung, phase)
        cost = UpdateCost(peak, named_parts(parts), tracker.now, work, sum(tracker.work.values(), Work()))
        if phase.updates_per_student_update > 1:
            alone, still = Tracker(self._card, label=part.current), replace(student, trains=False)
            learning = {role: of for role, of in optimizers.items() if role != STUDENT}
            arrived = replace(batch, own_moves=None)  # the moves are counted in the update above
            trace_update(alone, part, phase, learning, lambda: samples(arrived, student=still), self._config)
            others = self._whole(alone.work, rung, phase)
            cost = replace(cost, work=_mean(work, others, 1 / phase.updates_per_student_update))
        for optimizer in optimizers.values():
            optimizer.close()
        return cost

    def _whole(self, work: dict[str, Work], rung: Rung, phase: Phase) -> dict[str, Work]:
        """The work of a whole update, from that of one micro-batch with one move of the teacher and of the student's own."""
        micro = self._config.training.gradient_accumulation_steps
        moves = 1.0
        if phase.needs_teacher_moves:
            steps = phase.teacher_steps or rung.teacher_steps
            moves = teacher_substeps(rung, steps, self._rehearsal.facts.num_train_timesteps)
            moves *= min(1.0, (phase.cached_updates or phase.max_train_steps) / phase.max_train_steps)
        factors = {"teacher": micro * moves, _OWN_MOVES: micro * own_moves(rung, phase), OPTIMISER: 1}
        return {part: done * factors.get(part, micro) for part, done in work.items()}

    def _hold(self, tracker: Tracker, phase: Phase, optimizers: dict[str, RoleOptimizer]) -> None:
        """Counts what exists on the GPU before the update."""
        base = [p for name, p in self.network.model.named_parameters() if "lora_" not in name]
        tracker.hold(base, "base model")
        saved = base_bytes(base_modules(self.network.model), self._config.training.base_quantization)
        tracker.hold_bytes(saved - sum(p.numel() * p.itemsize for p in base), "base model")
        tracker.hold(self.network.model.buffers(), "base model")
        for role in (STUDENT, DISCRIMINATOR, FAKE_SCORE):
            if role in optimizers:
                hold_role(tracker, role, optimizers[role], self._config)
        if phase.balance == "gradient":  # an update that measures holds the gradient of each objective
            master = self.network.weights(STUDENT).master
            tracker.hold_bytes(
                len(phase.kinds) * master.numel() * master.itemsize, "student: gradient by objective"
            )
        teacher = [p for name, p in self.network.model.named_parameters() if f".{TEACHER}." in name]
        if phase.asks_teacher:  # else it is parked on the CPU
            tracker.hold(teacher, "teacher: weights")
        tracker.hold_bytes(self._experts_bytes(), "teacher: weights")
        if phase.teacher == "ema":
            tracker.hold_bytes(self.network.weights(STUDENT).master.numel() * 4, "teacher: average")

    def _experts_bytes(self) -> int:
        """Bytes of several teachers beside the base model: their LoRAs, as wide as the student's, and other U-Nets, such as
        the original of a smaller base."""
        size, dtype_bytes = 0, self.network.dtype.itemsize
        for teacher in self._teachers:
            with torch.device("meta"):
                model = build_network(teacher).to(self.network.dtype)
            size += base_bytes(model.modules(), self._config.training.base_quantization)
        student = sum(shape.numel() for shape in self.network.adapter_shapes(STUDENT).values())
        for expert in self._config.teachers:
            if expert.path is None and all(file.is_file() for file in lora_files(expert)):
                rank = lora_of(expert).rank if expert.loras else 0
                size += student * rank // self._config.lora.rank * dtype_bytes
        return size


def hold_role(tracker: Tracker, role: str, optimizer: RoleOptimizer, config: RunConfig) -> None:
    """Counts the weights, gradient and moments of a role that learns."""
    title, weights = role.replace("_", " "), optimizer.weights
    tracker.hold([weights.master, *weights.parameters.values()], f"{title}: weights")
    assert weights.master.grad is not None
    tracker.hold([weights.master.grad], f"{title}: gradient")
    tracker.hold(optimizer.tensors(), f"{title}: moments")
    other = MOMENTS[config.training.optimizer] - MOMENTS["adam"]
    tracker.hold_bytes(round(weights.master.numel() * other), f"{title}: moments")


class Parts:
    """Names the role that an operation belongs to."""

    def __init__(self, network: SharedNetwork, *, is_adversarial: bool) -> None:
        self._network, self._is_adversarial = network, is_adversarial
        self._name: str | None = None
        self._learner = STUDENT

    def current(self) -> str:
        """The role of the operation that runs now."""
        if self._name is not None:
            return self._name
        if torch._C._current_graph_task_id() != -1:
            return self._learner
        adapter = self._network.state.adapter
        if adapter in (STUDENT, DISCRIMINATOR, FAKE_SCORE):
            return adapter
        if not torch.is_grad_enabled():
            return TEACHER
        return DISCRIMINATOR if self._is_adversarial else STUDENT

    def backward(self, roles: tuple[str, ...]) -> Callable[[torch.Tensor], None]:
        """The backward passes of these roles, in order."""
        rest: Iterator[str] = iter(roles)

        def run(loss: torch.Tensor) -> None:
            self._learner = next(rest)
            loss.backward()

        return run

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Inside it, all operations belong to `name`."""
        self._name = name
        yield
        self._name = None


def trace_update(
    tracker: Tracker,
    part: Parts,
    phase: Phase,
    optimizers: Mapping[str, RoleOptimizer],
    samples: Callable[[], Samples],
    config: RunConfig,
) -> tuple[int, dict[str, int]]:
    """Traces one micro-batch, in which these roles learn, and their optimisers; returns the peak and its parts."""
    roles = tuple(role for role in roles_of(phase) if role in optimizers)
    tracker.reset_peak()
    with tracker:
        losses_and_gradients(samples(), phase, part.backward(roles), roles=roles)
        micro_peak, micro_parts = tracker.peak, tracker.peak_parts
        tracker.reset_peak()
        with part.named(OPTIMISER):
            for optimizer in optimizers.values():
                optimizer.clip(config.training.max_grad_norm)
                optimizer.step()
    return max((micro_peak, micro_parts), (tracker.peak, tracker.peak_parts), key=lambda x: x[0])


@dataclass(frozen=True)
class _Watched(Denoiser):
    """A denoiser some of whose work is counted apart."""

    part: Parts | None = None

    @classmethod
    def of(cls, denoiser: Denoiser, part: Parts) -> Self:
        return cls(**{field.name: getattr(denoiser, field.name) for field in fields(Denoiser)}, part=part)

    def _named(self, name: str) -> AbstractContextManager[None]:
        assert self.part is not None
        return self.part.named(name)


class _RealScore(_Watched):
    """The base as a score, apart from the teacher's moves."""

    def output(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        with self._named(_REAL_SCORE):
            return super().output(sample, timesteps, conditioning)


class _OwnMoves(_Watched):
    """The student, its moves before x_t apart from the one that it learns."""

    def rollout(
        self, sample: torch.Tensor, moves: Sequence[Move], conditioning: Conditioning
    ) -> torch.Tensor:
        with self._named(_OWN_MOVES):
            return super().rollout(sample, moves, conditioning)


def _mean(full: dict[str, Work], critics_only: dict[str, Work], share: float) -> dict[str, Work]:
    """The mean work of updates, of which `share` update the student too. All of them begin with its own moves."""
    critics_only = critics_only | {part: work for part, work in full.items() if part == _OWN_MOVES}
    return {part: work * share + critics_only.get(part, Work()) * (1 - share) for part, work in full.items()}


def named_parts(parts: dict[str, int]) -> dict[str, int]:
    """The parts at a peak, with those of operations summed as activations."""
    kept = {name: size for name, size in parts.items() if ":" in name or name == "base model"}
    kept[_ACTIVATIONS] = sum(parts.values()) - sum(kept.values())
    return {name: size for name, size in kept.items() if size}


def base_bytes(modules: Iterable[torch.nn.Module], quantization: Quantization) -> int:
    """Bytes of frozen modules, whose linear layers are quantised."""
    total = 0
    for module in modules:
        total += sum(p.nbytes for p in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear):
            total += quantized_bytes(module, quantization) - module.weight.nbytes
    return total


def base_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a network without those of its adapters."""
    for name, module in model.named_modules():
        if "lora_" not in name:
            yield module
