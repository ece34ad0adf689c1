"""Trains the rungs of the ladder in order; each rung's student is the next rung's teacher."""

import functools
import logging
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stepdistill.config import ConfigError, Phase, RunConfig, Rung
from stepdistill.data.cache import LatentCache, load_cache
from stepdistill.diffusion.noise_path import NoisePath
from stepdistill.disk.durable import (
    put_back_replaced,
    read_sealed,
    replace_folder,
    sha256_file,
    sha256_json,
    writing,
)
from stepdistill.disk.guarded import make_folder
from stepdistill.disk.places import clear_half_written
from stepdistill.disk.space import check_space, folder_bytes
from stepdistill.errors import CheckpointError, ToBeContinued
from stepdistill.models import adapters
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import DiscriminatorState, build_discriminator
from stepdistill.models.lora_file import write_lora
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork
from stepdistill.rng import derive_seed
from stepdistill.run.checkpoint_files import CHECKPOINTS, folders_of, partial_rung, place_of
from stepdistill.run.log import TrainingLog
from stepdistill.run.rung_order import begun_from, is_current, warn_of_training_again
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, read_record, read_rung, rung_folder
from stepdistill.run.settings import settings_behind
from stepdistill.run.start_from import TakenRung, check_base, missing_rungs, take_rungs, taken_steps
from stepdistill.run.stop import StopRequest
from stepdistill.runtime import Processes, Runtime, environment, release_memory
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import (
    fingerprint,
    load_noise_path,
    load_vae,
    vae_dtype,
)
from stepdistill.teacher.source import teacher_folder
from stepdistill.training.checkpoint import Checkpoint, Checkpoints, Identity, newest
from stepdistill.training.disk_bytes import rung_bytes
from stepdistill.training.guard import Trouble
from stepdistill.training.measure_looks import PhaseLooks
from stepdistill.training.painter import Painter
from stepdistill.training.phase import PhaseState, copied, run_phase
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.preview import MOST_TEACHER_STEPS, Preview

logger = logging.getLogger(__name__)
_VERSIONS = ("commit", "python", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
_UNET_PREFIX = "unet."
_LEAST_SCALE = 1 / 16
"""Smallest factor of the discriminator's learning rate that training goes back with."""
_ENCODER = re.compile(r"down_blocks|mid_block")


@dataclass(frozen=True)
class Shared:
    """Objects that all rungs of a run share.

    base            the folder of the teacher's pipeline
    network         the base U-Net with the adapters of student and teacher
    undistilled     the first rung's teacher: the base model with guidance and without an adapter
    cache           latents and text embeddings
    painter         draws pictures with a denoiser during training
    looks           measures sharpness, contrast and colour at the end of each phase
    """

    config: RunConfig
    base: Path
    network: SharedNetwork
    undistilled: Denoiser
    cache: LatentCache
    painter: Painter
    looks: PhaseLooks
    runtime: Runtime

    @functools.cached_property
    def base_fingerprint(self) -> str:
        """Identifies the base model."""
        return fingerprint(self.base)

    @property
    def samples_per_update(self) -> int:
        """Number of samples of an update, over all processes."""
        training = self.config.training
        return training.train_batch_size * training.gradient_accumulation_steps * self.runtime.num_processes

    def identity(self, position: int, phase: int, step: int) -> Identity:
        """What the state of rung number `position` after `step` updates of phase number `phase` belongs to."""
        config, versions = self.config, environment()
        manifest = read_sealed(config.run_dir / "cache" / "manifest.json") or {}
        earlier = [
            (r.student_steps, read_record(config.run_dir, r.student_steps)) for r in config.ladder[:position]
        ]
        return Identity(
            settings=settings_behind(config, position=position, phase=phase, step=step),
            rungs={str(steps): record.sha256 for steps, record in earlier if record is not None},
            base=self.base_fingerprint,
            cache=sha256_json(manifest.get("shards")),
            samples=self.samples_per_update,
            versions={name: str(versions[name]) for name in _VERSIONS},
        )

    @property
    def noise_path(self) -> NoisePath:
        """The noise path of the base model."""
        return self.undistilled.noise_path


def distill(config: RunConfig, *, only: tuple[int, int] | None = None) -> list[int]:
    """Trains the unfinished rungs in order; returns the student_steps of the rungs that it trained.

    Args:
        config: the run; its cache must be prepared.
        only: (teacher_steps, student_steps) of the one rung to train, even if it is finished; all rungs before it must be
            finished.
    """
    todo = [r for r in config.ladder if only is None or (r.teacher_steps, r.student_steps) == only]
    if not todo:
        allowed = ", ".join(f"{r.teacher_steps}:{r.student_steps}" for r in config.ladder)
        raise ValueError(
            f"--rung: got {only[0]}:{only[1]}; allowed: {allowed}" if only else "the ladder is empty"
        )
    _take_rungs(config)
    if only is None:
        todo = _unfinished(config)
    if not todo:
        return []
    with StopRequest(max_minutes=config.training.max_minutes) as stop:
        runtime = Runtime(mixed_precision=config.training.mixed_precision)
        return _train(load_shared(config, runtime), todo, stop)


def _train(shared: Shared, todo: list[Rung], stop: StopRequest) -> list[int]:
    """Trains rungs in order, the first one from its newest checkpoint if it has one; returns the student_steps of those that
    it trained. A later rung stays if it is finished and the rung before came out as it was. ToBeContinued if asked to stop.
    """
    config, runtime = shared.config, shared.runtime
    folder = partial_rung(config.run_dir, todo[0].student_steps) / CHECKPOINTS
    resumed = newest(folder, functools.partial(shared.identity, config.ladder.index(todo[0])))
    _check_samples(shared)
    _check_same_checkpoint(resumed, runtime)
    log, trained = None, list[int]()
    if runtime.is_main:
        _warn_of_rare_sizes(shared)
        log = TrainingLog(config.run_dir / "log.jsonl")
    try:
        for rung in todo:
            if trained and is_current(config.run_dir, rung):
                continue
            if log is not None:
                warn_of_training_again(config, rung)
                phase, step = (0, 0) if resumed is None else (resumed.phase, resumed.step)
                log.begin(rung.student_steps, phase=phase, step=step)
            _train_rung(shared, rung, log, resumed, stop)
            trained.append(rung.student_steps)
            resumed = None
    finally:
        if log is not None:
            log.close()
    return trained


def _check_samples(shared: Shared) -> None:
    """ConfigError if a finished rung of this run was trained with another number of samples in an update."""
    taken = taken_steps(shared.config)
    for rung in [rung for rung in shared.config.ladder if rung.student_steps not in taken]:
        record = read_record(shared.config.run_dir, rung.student_steps)
        before = None if record is None else record.samples_per_update
        if before not in (None, shared.samples_per_update):
            raise ConfigError(
                f"an update has {shared.samples_per_update} samples (training.train_batch_size times "
                f"gradient_accumulation_steps times the number of processes), but the {rung.student_steps}-step rung was "
                f"trained with {before}; allowed: other values or another number of processes, with a product of {before}"
            )


def _check_same_checkpoint(resumed: Checkpoint | None, runtime: Runtime) -> None:
    """CheckpointError, in all processes, if they would continue from different checkpoints."""
    place = -1 if resumed is None else resumed.phase * 10**10 + resumed.step
    if not runtime.is_same(place):
        text = "none" if resumed is None else str(resumed.folder)
        raise CheckpointError(
            f"the processes of the launch read different checkpoints, process {runtime.process_index} {text}; allowed: one "
            f"for all; mend: start the command again, on a file system that shows all machines the same files"
        )


def rungs_to_copy(config: RunConfig) -> list[TakenRung]:
    """The rungs of another run that `start_from` takes over and that this run's folder does not have yet; ConfigError if one
    does not fit, or was trained on another base model than the teacher."""
    if config.start_from is None:
        return []
    base = teacher_folder(config)
    rungs = missing_rungs(config, base_prediction_type=TeacherFacts.of_folder(base).prediction_type)
    if rungs:
        check_base(config, rungs, base_fingerprint=fingerprint(base))
    return rungs


def _take_rungs(config: RunConfig) -> None:
    """Clears up after a kill in the moment in which a rung came to its place, and copies the rungs that `start_from` takes
    over; one process does it, the others wait."""
    processes = Processes()
    if processes.is_main:
        put_back_replaced(config.run_dir / "rungs")
        for rung in config.ladder:
            shutil.rmtree(rung_folder(config.run_dir, rung.student_steps) / CHECKPOINTS, ignore_errors=True)
        take_rungs(config, rungs_to_copy(config))
    processes.wait()


def _unfinished(config: RunConfig) -> list[Rung]:
    """The ladder from its first rung on that has to be trained."""
    for index, rung in enumerate(config.ladder):
        if not is_current(config.run_dir, rung):
            return list(config.ladder[index:])
    return []


def load_shared(config: RunConfig, runtime: Runtime) -> Shared:
    """Loads the shared network, the cache and all else that every rung needs, after freeing models of earlier stages."""
    release_memory()
    base = teacher_folder(config)
    unet = load_network(base, dtype=runtime.weight_dtype, quantization=config.training.base_quantization).to(
        runtime.device
    )
    network = SharedNetwork.with_student_and_teacher(
        unet,
        rank=config.lora.rank,
        seed=derive_seed(config.seed, "lora"),
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    facts = TeacherFacts.of_folder(base)
    noise_path, prediction_type = load_noise_path(facts.scheduler)
    cache = load_cache(config)
    undistilled = Denoiser(
        network,
        None,
        noise_path.to(runtime.device),
        prediction_type,
        guidance_scale=config.teacher.guidance_scale,
        unconditional=cache.unconditional.to(runtime.device, runtime.weight_dtype),
    )
    painter = Painter(
        load_vae(base, dtype=vae_dtype(facts, runtime.weight_dtype)),
        batch_size=config.training.train_batch_size,
        autocast=runtime.autocast,
    )
    looks = PhaseLooks(
        painter,
        cache,
        undistilled,
        teacher_steps=min(config.evaluation.teacher_steps[0], MOST_TEACHER_STEPS),
        images=config.preview.looks_images,
        seed=config.seed,
    )
    return Shared(config, base, network, undistilled, cache, painter, looks, runtime)


def _warn_of_rare_sizes(shared: Shared) -> None:
    """Warns of sizes with fewer pictures than an update has samples: `prepare` does not count the training processes."""
    training, sizes = shared.config.training, shared.cache.sizes
    group = training.train_batch_size * training.gradient_accumulation_steps * shared.runtime.num_processes
    few = sum(count for count in sizes.values() if count < group)
    if few and len(sizes) > 1:
        logger.warning(
            "distill: %d of %d pictures have sizes with fewer pictures than the %d samples of an update: such a picture "
            "comes several times in one update, then rarely; mend: data.min_per_bucket=%d and another name=...",
            few,
            len(shared.cache),
            group,
            group,
        )


def _train_rung(
    shared: Shared, rung: Rung, log: TrainingLog | None, resumed: Checkpoint | None, stop: StopRequest
) -> None:
    """Trains a rung from its first phase, or continues it from a checkpoint."""
    config, network = shared.config, shared.network
    position = config.ladder.index(rung)
    if position:
        adapters.load_adapter_state(network.model, STUDENT, read_lora(config.run_dir, rung.teacher_steps))
    partial = partial_rung(config.run_dir, rung.student_steps)
    if shared.runtime.is_main:
        _open_partial(shared, rung, is_resumed=resumed is not None)
    shared.runtime.wait()
    options = config.training.checkpoint
    checkpoints = Checkpoints(
        partial / CHECKPOINTS,
        functools.partial(shared.identity, position),
        every_minutes=options.every_minutes,
        keep=options.keep,
        seconds=0.0 if resumed is None else resumed.seconds,
    )
    prompts, folder = list(config.preview.prompts), partial / "previews"
    preview = Preview(shared.painter, shared.cache, prompts, seed=config.seed, folder=folder)
    predicted = config.prediction_types(shared.undistilled.prediction_type)
    if resumed is not None and resumed.phase == len(rung.phases):
        adapters.load_adapter_state(network.model, STUDENT, resumed.state["student"])
        shared.runtime.load_loss_scale_state(resumed.state["loss_scale"])
    else:
        training = _RungTraining(shared, rung, predicted, preview, log, checkpoints, stop)
        training.train(resumed)
        if shared.runtime.is_main:
            checkpoints.save(len(rung.phases), 0, training._between_phases(), None)
            checkpoints.wait()
    shared.runtime.wait()
    if shared.runtime.is_main:
        seconds = round(checkpoints.seconds, 1)
        _finish_rung(shared, rung, partial, prediction_type=predicted[position], seconds=seconds)
    shared.runtime.wait()


def _open_partial(shared: Shared, rung: Rung, *, is_resumed: bool) -> None:
    """Makes the folder of a rung that is about to be trained, empty unless the rung continues from a checkpoint. ValueError
    if the disk has no room for the rung."""
    config, network = shared.config, shared.network.model
    partial = partial_rung(config.run_dir, rung.student_steps)
    later = config.ladder[config.ladder.index(rung) + 1 :]  # begun from what this rung was before
    outdated = [partial_rung(config.run_dir, r.student_steps) for r in later]
    for folder in outdated if is_resumed else [*outdated, partial]:
        shutil.rmtree(folder, ignore_errors=True)
    with writing(partial):
        make_folder(partial)
    clear_half_written(partial)
    need = rung_bytes(
        config,
        rung,
        parameters=sum(p.numel() for p in shared.network.group(STUDENT).values()),
        encoder=sum(p.numel() for name, p in network.named_parameters() if _ENCODER.search(name)),
        size=max(shared.cache.sizes),
    )
    check_space(partial, need - folder_bytes(partial), f"the {rung.student_steps}-step rung")


def _finish_rung(shared: Shared, rung: Rung, partial: Path, *, prediction_type: str, seconds: float) -> None:
    """Writes the LoRA and its record into the folder `partial`, which then becomes the rung's folder. The checkpoints are
    removed after that, so that nothing is lost if it fails."""
    save_lora(shared.network, partial)
    record = RungRecord(
        student_steps=rung.student_steps,
        teacher_steps=rung.teacher_steps,
        prediction_type=prediction_type,
        lora_rank=shared.config.lora.rank,
        base_fingerprint=shared.base_fingerprint,
        sha256=sha256_file(partial / WEIGHT_NAME),
        training_seconds=seconds,
        start_timestep=rung.start_timestep,
        samples_per_update=shared.samples_per_update,
        teacher_sha256=begun_from(shared.config.run_dir, rung),
    )
    record.write(partial)
    final = rung_folder(shared.config.run_dir, rung.student_steps)
    with writing(final):
        replace_folder(partial, final)
    shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)


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
class _RungTraining:
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
        if resumed is None and self._rewinds:
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
            if number + 1 < len(self.rung.phases):
                self._save_between(number + 1, carried)
            start = _Start(phase=number + 1, carried=carried)

    def _start_of(self, resumed: Checkpoint, *, adversary_scale: float = 1.0) -> _Start:
        carried = None if resumed.carried is None else DiscriminatorState(**resumed.carried)
        return _Start(resumed.phase, self._load(resumed), carried, adversary_scale)

    def _rewound(self, diverged: _Diverged) -> _Start:
        """Removes the checkpoints and log lines after the last good update; the start from the newest checkpoint that is
        left."""
        runtime, phase, step = self.shared.runtime, diverged.phase, diverged.good_step
        self.checkpoints.wait()
        if runtime.is_main:
            for folder in folders_of(self.checkpoints.folder):
                if place_of(folder) > (phase, step):
                    shutil.rmtree(folder)
        runtime.wait()
        position = self.shared.config.ladder.index(self.rung)
        back = newest(self.checkpoints.folder, functools.partial(self.shared.identity, position))
        _check_same_checkpoint(back, runtime)
        if back is None:
            raise CheckpointError(
                f"{self.checkpoints.folder} has no intact checkpoint to go back to; mend: the same command, which trains "
                f"the rung from its start"
            )
        if self.log is not None:
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
        logger.info(
            "distill: the %d-step rung continues in phase %d after %d of %d updates",
            self.rung.student_steps,
            resumed.phase,
            resumed.step,
            self.rung.phases[resumed.phase].max_train_steps,
        )
        if resumed.step:
            return resumed.state
        adapters.load_adapter_state(self.shared.network.model, STUDENT, resumed.state["student"])
        self.shared.runtime.load_loss_scale_state(resumed.state["loss_scale"])
        return None

    def _save_between(self, number: int, carried: DiscriminatorState | None) -> None:
        """Saves the state in which phase `number` begins."""
        if self.shared.runtime.is_main:
            self._save(number, 0, self._between_phases(), carried)

    def _between_phases(self) -> dict[str, Any]:
        """A copy of all that one phase leaves for the next, besides its discriminator."""
        student = adapters.adapter_state(self.shared.network.model, STUDENT)
        return copied({"student": student, "loss_scale": self.shared.runtime.loss_scale_state()})

    def _save(self, phase: int, step: int, state: dict[str, Any], carried: DiscriminatorState | None) -> None:
        self.checkpoints.save(phase, step, state, None if carried is None else vars(carried))

    def _train_phase(self, number: int, start: _Start) -> DiscriminatorState | None:
        """Trains one phase; returns the discriminator's state, or None if it has none or no later phase starts from it."""
        shared, rung = self.shared, self.rung
        phase, carried = rung.phases[number], start.carried
        setup = self._setup(number, phase, start)
        warned = set[str]()

        def between_updates(state: PhaseState, trouble: Trouble | None) -> None:
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
            )
        except _Diverged:
            if setup.discriminator is not None:
                setup.discriminator.close()
            raise
        if shared.runtime.is_main:
            path = self.preview.folder / f"phase{number}-{phase.title}-end.json"
            shared.looks.write(path, setup.student, steps=rung.student_steps)
        if setup.discriminator is None:
            return None
        is_needed = any(p.discriminator.start == "carried" for p in rung.phases[number + 1 :])
        state = setup.discriminator.state() if is_needed else None
        setup.discriminator.close()
        return state

    def _save_and_stop(
        self, setup: PhaseSetup, state: PhaseState, carried: DiscriminatorState | None
    ) -> None:
        """Saves a checkpoint if one is due. ToBeContinued, with a checkpoint, if training is asked to stop."""
        runtime = self.shared.runtime
        exit_code = runtime.largest(self.stop.exit_code)
        if runtime.is_main and (exit_code or self.checkpoints.is_due):
            self._save(setup.number, state.step, state.state_dict(), carried)
        if exit_code:
            self.checkpoints.wait()
            runtime.wait()  # a launcher ends all processes as soon as one has ended
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
        if self._rewinds and trouble.ends_with_rewind and scale >= _LEAST_SCALE and state.guard is not None:
            raise _Diverged(setup.number, state.guard.good_step, scale)

    def _setup(self, number: int, phase: Phase, start: _Start) -> PhaseSetup:
        shared, rung, config = self.shared, self.rung, self.shared.config
        teacher_steps = phase.teacher_steps or rung.teacher_steps
        student, teacher = self._student(), self._teacher(teacher_steps)
        discriminator = build_discriminator(
            shared.network,
            phase,
            base=shared.base,
            rank=config.lora.rank,
            seed=derive_seed(config.seed, rung.student_steps, number, "discriminator"),
            sample_size=shared.cache.smallest_side,
            carried=start.carried,
        )

        def draw(name: str) -> None:
            if shared.runtime.is_main:
                steps = {"student_steps": rung.student_steps, "teacher_steps": teacher_steps}
                self.preview.draw(name, student, teacher, **steps)

        return PhaseSetup(
            rung=rung,
            phase=phase,
            number=number,
            training=config.training,
            seed=config.seed,
            student=student,
            teacher=teacher,
            discriminator=discriminator,
            cache=shared.cache,
            preview=draw,
            adversary_scale=start.adversary_scale,
        )

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

    def _teacher(self, teacher_steps: int) -> Denoiser:
        """The student of the earlier rung with this many steps, its LoRA loaded; without one the undistilled teacher."""
        shared, students = self.shared, [r.student_steps for r in self.shared.config.ladder]
        if teacher_steps not in students[: students.index(self.rung.student_steps)]:
            return shared.undistilled
        lora = read_lora(shared.config.run_dir, teacher_steps)
        adapters.load_adapter_state(shared.network.model, TEACHER, lora)
        prediction_type = self.prediction_types[students.index(teacher_steps)]
        return Denoiser(shared.network, TEACHER, shared.noise_path, prediction_type)


def save_lora(network: SharedNetwork, folder: Path) -> None:
    """Writes the student's LoRA into a folder."""
    state = adapters.adapter_state(network.model, STUDENT)
    write_lora(folder, state, adapters.adapter_metadata(network.model, STUDENT))


def read_lora(run_dir: Path, student_steps: int) -> dict:
    """The weights of a finished rung's LoRA by peft's keys; ValueError if the rung is missing or damaged."""
    if read_rung(run_dir, student_steps) is None:
        raise ValueError(
            f"the {student_steps}-step rung in {run_dir} is missing or changed; mend: `stepdistill distill` trains it again"
        )
    return read_lora_file(rung_folder(run_dir, student_steps) / WEIGHT_NAME)


def read_lora_file(path: Path) -> dict:
    """The weights in a file that `save_lora` wrote, by peft's keys."""
    state = load_file(path)
    return {key.removeprefix(_UNET_PREFIX): tensor for key, tensor in state.items()}


@torch.no_grad()
def seconds_per_forward(config: RunConfig) -> float:
    """Seconds per sample of a U-Net forward pass with a LoRA on this machine, at the training batch size; best of three."""
    runtime = Runtime(mixed_precision=config.training.mixed_precision)
    unet = load_network(
        teacher_folder(config),
        dtype=runtime.weight_dtype,
        quantization=config.training.base_quantization,
    ).to(runtime.device)
    network = SharedNetwork(unet)
    network.add_adapter(STUDENT, rank=config.lora.rank, seed=0)
    cache = load_cache(config)
    size, count = max(cache.sizes.items(), key=lambda item: item[1])
    samples = cache.samples(size, [k % count for k in range(config.training.train_batch_size)])
    sample = samples.latents.to(runtime.device)
    conditioning = samples.conditioning.to(runtime.device, runtime.weight_dtype)
    timesteps = torch.full((len(sample),), 500, device=runtime.device)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        with runtime.autocast(), network.using(STUDENT):
            network.ask(sample, timesteps, conditioning)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return min(seconds) / len(sample)
