"""Trains the phases of one rung, with checkpoints, and goes back to one if an adversarial phase diverges."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepdistill.config import Phase, Rung
from stepdistill.errors import CheckpointError, OutOfMemoryError, ToBeContinued
from stepdistill.ladder.rung_files import read_rung_lora
from stepdistill.ladder.shared import Shared
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import DiscriminatorState, build_discriminator
from stepdistill.models.scores import build_scores
from stepdistill.models.shared_network import STUDENT, TEACHER
from stepdistill.rng import derive_seed
from stepdistill.run.log import TrainingLog
from stepdistill.run.stop import StopRequest
from stepdistill.runtime import Runtime
from stepdistill.training.checkpoint import Checkpoint, Checkpoints, newest, remove_after
from stepdistill.training.guard import Trouble
from stepdistill.training.painter import skipped_without_memory
from stepdistill.training.phase import PhaseState, copied, run_phase
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.preview import Preview

logger = logging.getLogger(__name__)
_MIN_SCALE = 1 / 16
"""Smallest factor of the discriminator's learning rate that training goes back with."""


@dataclass(frozen=True)
class _Start:
    """Where the training of a rung begins.

    phase            number of the phase
    state            the state in which it continues; None: from its first update
    carried          the discriminator's state after the rung's previous adversarial phase
    adversary_scale  factor of the discriminator's learning rate in this phase
    """

    phase: int = 0
    state: dict[str, Any] | None = None
    carried: DiscriminatorState | None = None
    adversary_scale: float = 1.0


class _Diverged(Exception):
    """An adversarial phase went wrong after `good_step` updates; it is to be trained again from there."""

    def __init__(self, phase: int, good_step: int, adversary_scale: float) -> None:
        super().__init__()
        self.phase, self.good_step, self.adversary_scale = phase, good_step, adversary_scale


@dataclass(frozen=True)
class RungTraining:
    """Trains the phases of one rung. prediction_types: what the student of each rung of the ladder predicts."""

    shared: Shared
    rung: Rung
    prediction_types: list[str]
    preview: Preview
    log: TrainingLog | None
    checkpoints: Checkpoints
    stop: StopRequest

    def train(self, resumed: Checkpoint | None) -> None:
        """Trains the phases in order; from a checkpoint, those that were not finished there. Goes back to a checkpoint as
        often as a phase diverges, which it does only with training.guard: rewind."""
        start = _Start() if resumed is None else self._start_of(resumed)
        if resumed is None:
            self._save_between(0, None)
        while True:
            try:
                return self._train_from(start)
            except _Diverged as diverged:
                start = self._rewound(diverged)

    @property
    def _rewinds(self) -> bool:
        return self.shared.config.training.guard == "rewind"

    def _train_from(self, start: _Start) -> None:
        for number in range(start.phase, len(self.rung.phases)):
            carried = self._train_phase(number, start) or start.carried
            if not self._is_carried_after(number):
                carried = None
            if number + 1 < len(self.rung.phases):
                self._save_between(number + 1, carried)
            start = _Start(phase=number + 1, carried=carried)

    def _is_carried_after(self, number: int) -> bool:
        """Whether a phase after phase `number` starts from the discriminator of an earlier one."""
        return any(phase.discriminator.start == "carried" for phase in self.rung.phases[number + 1 :])

    def _start_of(self, resumed: Checkpoint, *, adversary_scale: float = 1.0) -> _Start:
        carried = None if resumed.carried is None else DiscriminatorState(**resumed.carried)
        return _Start(resumed.phase, self._load(resumed), carried, adversary_scale)

    def _rewound(self, diverged: _Diverged) -> _Start:
        """The start from the diverged phase's newest checkpoint that was written while all was well. Checkpoints and log
        lines of later updates are removed. CheckpointError, with nothing removed, if there is none."""
        runtime, folder = self.shared.runtime, self.checkpoints.folder
        self.checkpoints.wait()
        runtime.wait()  # until process 0 has written the last one
        identity = functools.partial(self.shared.identity, self.shared.config.ladder.index(self.rung))
        back = newest(folder, identity, until=(diverged.phase, diverged.good_step))
        check_same_checkpoint(back, runtime)
        if back is None or back.phase != diverged.phase:
            raise CheckpointError(
                f"phase {diverged.phase} diverged, and {folder} has no intact checkpoint of it to go back to; fix: the "
                f"same command with a lower learning rate of the discriminator"
            )
        if self.log is not None:
            remove_after(folder, back.phase, back.step)
            logger.warning(
                "distill: back to update %d of phase %d, with %g times the discriminator's learning rate",
                back.step,
                back.phase,
                diverged.adversary_scale,
            )
            self.log.begin(self.rung.student_steps, phase=back.phase, step=back.step)
        return self._start_of(back, adversary_scale=diverged.adversary_scale)

    def _load(self, resumed: Checkpoint) -> dict[str, Any] | None:
        """The state in which the checkpoint's phase continues; None if the phase begins there, with the student loaded."""
        if self.log is not None:
            logger.info(
                "distill: the %d-step rung continues in phase %d after %d of %d updates",
                self.rung.student_steps,
                resumed.phase,
                resumed.step,
                self.rung.phases[resumed.phase].max_train_steps,
            )
        if resumed.step:
            return resumed.state
        self.shared.network.load_adapter_state(STUDENT, resumed.state["student"])
        self.shared.runtime.load_loss_scale_state(resumed.state["loss_scale"])
        return None

    def _save_between(self, number: int, carried: DiscriminatorState | None) -> None:
        """Saves the state in which phase `number` begins."""
        if self.shared.runtime.is_main:
            self._save(number, 0, self.between_phases(), carried)

    def between_phases(self) -> dict[str, Any]:
        """A copy of all that one phase leaves for the next, besides its discriminator."""
        student = self.shared.network.adapter_state(STUDENT)
        return copied({"student": student, "loss_scale": self.shared.runtime.loss_scale_state()})

    def _save(self, phase: int, step: int, state: dict[str, Any], carried: DiscriminatorState | None) -> None:
        if self.log is not None:
            self.log.sync()  # a power cut must not leave a checkpoint of updates whose lines are lost
        self.checkpoints.save(phase, step, state, None if carried is None else vars(carried))

    def _train_phase(self, number: int, start: _Start) -> DiscriminatorState | None:
        """Trains one phase; returns the discriminator's state, or None if it has none or no later phase starts from it."""
        shared, rung = self.shared, self.rung
        phase, carried = rung.phases[number], start.carried
        setup = self._setup(number, phase, start)
        warned = set[str]()
        latest: list[PhaseState] = []

        def between_updates(state: PhaseState, trouble: Trouble | None) -> None:
            latest[:] = [state]
            if trouble is not None:
                self._warn_or_go_back(setup, state, trouble, warned)
            self._save_and_stop(setup, state, carried)

        try:
            run_phase(
                setup,
                runtime=shared.runtime,
                log=self.log,
                start=start.state,
                after_update=between_updates,
                track=functools.partial(self._track, number),
            )
        except _Diverged:
            setup.close()
            raise
        except OutOfMemoryError:
            if shared.runtime.is_main and latest:
                self._save(number, latest[0].step, latest[0].state_dict(), carried)
                self.checkpoints.wait()
            raise
        if shared.runtime.is_main:
            path = self.preview.folder / f"phase{number}-{phase.title}-end.json"
            with skipped_without_memory(path.name):
                shared.looks.write(path, setup.student, steps=rung.student_steps)
        state = None
        if setup.discriminator is not None and self._is_carried_after(number):
            state = setup.discriminator.state()
        setup.close()
        return state

    def _track(self, number: int, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the numbers of an update of phase `number` to the trackers."""
        if self.shared.trackers is not None:
            self.shared.trackers.log(self.rung.student_steps, number, step, numbers)

    def _save_and_stop(
        self, setup: PhaseSetup, state: PhaseState, carried: DiscriminatorState | None
    ) -> None:
        """Saves a checkpoint if one is due. If training is asked to stop: ToBeContinued, with a checkpoint; CheckpointError
        if none could be written."""
        runtime = self.shared.runtime
        exit_code = runtime.largest(self.stop.exit_code)
        if runtime.is_main and (exit_code or self.checkpoints.is_due):
            self._save(setup.number, state.step, state.state_dict(), carried)
        if exit_code:
            is_lost = runtime.largest(int(self.checkpoints.wait() is not None))
            runtime.wait()  # a launcher ends all processes as soon as one has ended
            if is_lost:
                raise CheckpointError(
                    f"stopped after update {state.step} of {setup.phase.max_train_steps} of {setup.title}, but its state "
                    f"could not be written, as the warning above says; fix: remove the cause, then the same command, which "
                    f"continues from the checkpoint before"
                )
            raise ToBeContinued(
                f"stopped ({self.stop.reason}) after update {state.step} of {setup.phase.max_train_steps} of {setup.title}; "
                f"the same command continues there",
                exit_code,
            )

    def _warn_or_go_back(
        self, setup: PhaseSetup, state: PhaseState, trouble: Trouble, warned: set[str]
    ) -> None:
        """Warns once of each kind of trouble. _Diverged if training is to go back to a checkpoint."""
        if self.shared.runtime.is_main and trouble.kind not in warned:
            logger.warning(
                "distill: %s, update %d: %s; see docs/guide.md", setup.title, state.step, trouble.text
            )
        warned.add(trouble.kind)
        scale = state.adversary_scale / 2
        if self._rewinds and trouble.ends_with_rewind and scale >= _MIN_SCALE and state.guard is not None:
            raise _Diverged(setup.number, state.guard.good_step, scale)

    def _setup(self, number: int, phase: Phase, start: _Start) -> PhaseSetup:
        shared, rung, config = self.shared, self.rung, self.shared.config
        teacher_steps = phase.teacher_steps or rung.teacher_steps
        student = self._student()
        teacher = self._teacher(teacher_steps) if phase.teacher == "rung" else self._self_teacher(student)
        shared.network.keep_activations(shared.keeps.get((rung.student_steps, number), ()))
        discriminator = build_discriminator(
            shared.network,
            phase,
            base=shared.base,
            rank=config.lora.rank,
            seed=derive_seed(config.seed, rung.student_steps, number, "discriminator"),
            sample_size=shared.cache.smallest_side,
            carried=start.carried,
        )

        scores = build_scores(
            phase,
            shared.undistilled,
            rank=config.lora.rank,
            seed=derive_seed(config.seed, rung.student_steps, number, "fake_score"),
        )

        return PhaseSetup(
            rung=rung,
            phase=phase,
            number=number,
            training=config.training,
            seed=config.seed,
            student=student,
            teacher=teacher,
            discriminator=discriminator,
            scores=scores,
            cache=shared.cache,
            preview=self._preview(number, student, teacher, teacher_steps),
            adversary_scale=start.adversary_scale,
        )

    def _preview(
        self, number: int, student: Denoiser, teacher: Denoiser, teacher_steps: int
    ) -> Callable[[str, int], None]:
        """Draws student and teacher in the middle of phase `number` and at its end, and sends the image to the trackers."""
        shared, rung = self.shared, self.rung

        def draw(name: str, step: int) -> None:
            if shared.runtime.is_main:
                steps = {"student_steps": rung.student_steps, "teacher_steps": teacher_steps}
                with skipped_without_memory(f"{name}.png"):
                    path = self.preview.draw(name, student, teacher, **steps)
                    if shared.trackers is not None:
                        shared.trackers.image(rung.student_steps, number, step, path)

        return draw

    def _student(self) -> Denoiser:
        shared, rung = self.shared, self.rung
        return Denoiser(
            shared.network,
            STUDENT,
            shared.noise_path,
            self.prediction_types[shared.config.ladder.index(rung)],
            start_timestep=rung.start_timestep,
            trains=True,
        )

    def _self_teacher(self, student: Denoiser) -> Denoiser:
        """The student's moving average, which the phase's state keeps in the teacher's adapter."""
        return dataclasses.replace(student, adapter=TEACHER, trains=False)

    def _teacher(self, teacher_steps: int) -> Denoiser:
        """The student of the earlier rung with this many steps, its LoRA loaded; without one the undistilled teacher."""
        shared, students = self.shared, [r.student_steps for r in self.shared.config.ladder]
        if teacher_steps not in students[: students.index(self.rung.student_steps)]:
            return shared.undistilled
        lora = read_rung_lora(shared.config.run_dir, teacher_steps)
        shared.network.load_adapter_state(TEACHER, lora)
        prediction_type = self.prediction_types[students.index(teacher_steps)]
        return Denoiser(shared.network, TEACHER, shared.noise_path, prediction_type)


def check_same_checkpoint(resumed: Checkpoint | None, runtime: Runtime) -> None:
    """CheckpointError, in all processes, if they would continue from different checkpoints."""
    place = -1 if resumed is None else resumed.phase * 10**10 + resumed.step
    if not runtime.is_same(place):
        text = "none" if resumed is None else str(resumed.folder)
        raise CheckpointError(
            f"the processes of the launch read different checkpoints, process {runtime.process_index} {text}; allowed: one "
            f"for all; fix: start the command again, on a file system that shows all machines the same files"
        )
