"""Trains the rungs of the ladder in order; each rung's student is the next rung's teacher."""

import functools
import logging
import shutil

from stepdistill.config import ConfigError, RunConfig, Rung
from stepdistill.data.held_out import settled
from stepdistill.disk.durable import put_back_replaced
from stepdistill.errors import ToBeContinued
from stepdistill.ladder.initial_lora import initial_state
from stepdistill.ladder.phases import RungTraining, check_same_checkpoint
from stepdistill.ladder.rung_files import finish_rung, open_partial, read_rung_lora
from stepdistill.ladder.shared import Shared, load_shared
from stepdistill.models.shared_network import STUDENT
from stepdistill.run.checkpoint_files import CHECKPOINTS, partial_rung
from stepdistill.run.log import TrainingLog
from stepdistill.run.rung_order import is_current, warn_of_training_again
from stepdistill.run.rungs import read_record, rung_folder
from stepdistill.run.start_from import TakenRung, check_rungs_base, missing_rungs, take_rungs, taken_steps
from stepdistill.run.stop import StopRequest
from stepdistill.runtime import Processes, Runtime
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import fingerprint
from stepdistill.teacher.source import teacher_folder
from stepdistill.training.checkpoint import Checkpoint, Checkpoints, newest, remove_after
from stepdistill.training.preview import Preview

logger = logging.getLogger(__name__)


def distill(
    config: RunConfig, *, only: tuple[int, int] | None = None, began: float | None = None
) -> list[int]:
    """Trains the unfinished rungs in order; returns the student_steps of the rungs that it trained. ToBeContinued if it is
    asked to stop.

    Args:
        config: the run; its cache must be prepared.
        only: (teacher_steps, student_steps) of the one rung to train, even if it is finished; all rungs before it must be
            finished.
        began: time.monotonic() from which training.max_minutes counts; None: now.
    """
    todo = rungs_of(config, only)
    _take_rungs(config)
    if only is None:
        todo = _unfinished(config)
    if not todo:
        return []
    with StopRequest(max_minutes=config.training.max_minutes, began=began) as stop:
        runtime = Runtime(mixed_precision=config.training.mixed_precision)
        trained = _train(load_shared(settled(config), runtime), todo, stop)
        exit_code = runtime.largest(stop.exit_code)
        if exit_code:
            runtime.wait()  # a launcher ends all processes as soon as one has ended
            raise ToBeContinued(
                f"stopped ({stop.reason}) after the last rung; the same command continues there", exit_code
            )
        return trained


def rungs_of(config: RunConfig, only: tuple[int, int] | None) -> list[Rung]:
    """The ladder, or the one rung with these (teacher_steps, student_steps); ConfigError if there is none."""
    if only is None:
        return list(config.ladder)
    rungs = [r for r in config.ladder if (r.teacher_steps, r.student_steps) == only]
    if not rungs:
        allowed = ", ".join(f"{r.teacher_steps}:{r.student_steps}" for r in config.ladder)
        raise ConfigError(f"--rung: got {only[0]}:{only[1]}; allowed: {allowed}")
    return rungs


def _train(shared: Shared, todo: list[Rung], stop: StopRequest) -> list[int]:
    """Trains rungs in order, each from its newest checkpoint if it has one; returns the student_steps of those that it
    trained. A finished later rung is not trained again if the rung before it has the same weights as when it began.
    ToBeContinued if asked to stop.
    """
    config, runtime = shared.config, shared.runtime
    _check_samples(shared)
    log, trained = None, list[int]()
    if runtime.is_main:
        _warn_of_rare_sizes(shared)
        log = TrainingLog(config.run_dir / "log.jsonl")
    try:
        for rung in todo:
            if trained and is_current(config, rung):
                continue
            resumed = _resumed(shared, rung)
            if log is not None:
                warn_of_training_again(config, rung)
                phase, step = (0, 0) if resumed is None else (resumed.phase, resumed.step)
                log.begin(rung.student_steps, phase=phase, step=step)
            _train_rung(shared, rung, log, resumed, stop)
            trained.append(rung.student_steps)
    finally:
        if log is not None:
            log.close()
        if shared.trackers is not None:
            shared.trackers.close()
    return trained


def _resumed(shared: Shared, rung: Rung) -> Checkpoint | None:
    """The checkpoint from which a rung continues, or None. Damaged ones after it are removed."""
    folder = partial_rung(shared.config.run_dir, rung.student_steps) / CHECKPOINTS
    position = shared.config.ladder.index(rung)
    resumed = newest(folder, functools.partial(shared.identity, position))
    check_same_checkpoint(resumed, shared.runtime)
    if resumed is not None and shared.runtime.is_main:
        remove_after(folder, resumed.phase, resumed.step)
    return resumed


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


def rungs_to_copy(config: RunConfig) -> list[TakenRung]:
    """The rungs of another run that `start_from` takes over and that this run's folder does not have yet; ConfigError if one
    does not fit, or was trained on another base model than the teacher."""
    if config.start_from is None:
        return []
    base = teacher_folder(config)
    rungs = missing_rungs(config, base_prediction_type=TeacherFacts.of_folder(base).prediction_type)
    if rungs:
        check_rungs_base(config, rungs, base_fingerprint=fingerprint(base))
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
        if not is_current(config, rung):
            return list(config.ladder[index:])
    return []


def _warn_of_rare_sizes(shared: Shared) -> None:
    """Warns of sizes with fewer images than an update has samples: `prepare` does not count the training processes."""
    training, sizes = shared.config.training, shared.cache.sizes
    group = training.train_batch_size * training.gradient_accumulation_steps * shared.runtime.num_processes
    few = sum(count for count in sizes.values() if count < group)
    if few and len(sizes) > 1:
        logger.warning(
            "distill: %d of %d images have sizes with fewer images than the %d samples of an update: such an image "
            "comes several times in one update, then rarely; fix: data.min_per_bucket=%d and another name=...",
            few,
            len(shared.cache),
            group,
            group,
        )


def _load_start(shared: Shared, rung: Rung) -> None:
    """Gives the student the LoRA that the rung begins with; on the first rung it keeps its own."""
    config, network = shared.config, shared.network
    if rung.init is not None:
        network.load_adapter_state(STUDENT, initial_state(config, rung, network))
    elif rung != config.ladder[0]:
        network.load_adapter_state(STUDENT, read_rung_lora(config.run_dir, rung.teacher_steps))


def _train_rung(
    shared: Shared, rung: Rung, log: TrainingLog | None, resumed: Checkpoint | None, stop: StopRequest
) -> None:
    """Trains a rung from its first phase, or continues it from a checkpoint."""
    config, network = shared.config, shared.network
    shared.runtime.reset_loss_scale()
    position = config.ladder.index(rung)
    _load_start(shared, rung)
    partial = partial_rung(config.run_dir, rung.student_steps)
    if shared.runtime.is_main:
        open_partial(shared, rung, is_resumed=resumed is not None)
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
        if log is not None:
            logger.info("distill: the %d-step rung continues after its last update", rung.student_steps)
        network.load_adapter_state(STUDENT, resumed.state["student"])
        shared.runtime.load_loss_scale_state(resumed.state["loss_scale"])
    else:
        training = RungTraining(shared, rung, predicted, preview, log, checkpoints, stop)
        training.train(resumed)
        if shared.runtime.is_main:
            checkpoints.save(len(rung.phases), 0, training.between_phases(), None)
            checkpoints.wait()
    shared.runtime.wait()
    if shared.runtime.is_main:
        seconds = round(checkpoints.seconds, 1)
        finish_rung(shared, rung, partial, prediction_type=predicted[position], seconds=seconds)
    shared.runtime.wait()
