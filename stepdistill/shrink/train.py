"""Makes a run's smaller base model: chooses what to remove, trains what is left as a whole, writes it as a pipeline.

The smaller U-Net begins with the original's weights. Output and features of the original, at all timesteps and without
guidance, are what it learns (BK-SDM: Kim et al. 2023, arXiv 2305.15798).
"""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import RunConfig, Training
from stepdistill.data.batches import draw_batch
from stepdistill.data.cache import LatentCache, load_cache
from stepdistill.data.held_out import settled
from stepdistill.disk.durable import read_sealed, whole_folder, write_sealed
from stepdistill.errors import CheckpointError, OutOfMemoryError, ToBeContinued
from stepdistill.ladder.base_network import load_base
from stepdistill.ladder.shared import cache_hash, versions_of_training
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network.kind import kind_of, load_network
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.plan.dry_shrink import shrink_rung
from stepdistill.run.checkpoint_files import CHECKPOINTS
from stepdistill.run.log import TrainingLog
from stepdistill.run.settings import settings_of_every_rung
from stepdistill.run.stop import StopRequest
from stepdistill.runtime import Processes, Runtime, release_memory
from stepdistill.shrink.smaller_network import (
    OutputError,
    Removal,
    chosen,
    parameters_of,
    plain_config,
    removals,
    sensitivity_table,
    smaller_network,
)
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_header, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, weights_variant
from stepdistill.teacher.loading import fingerprint, load_noise_path, load_vae, vae_dtype
from stepdistill.teacher.small_base import RECORD, base_folder, base_record, work_folder
from stepdistill.teacher.source import teacher_folder
from stepdistill.teacher.unet_parts import check_removed
from stepdistill.training.checkpoint import Checkpoint, Checkpoints, Identity, newest, remove_after
from stepdistill.training.guard import Trouble
from stepdistill.training.painter import Painter, skipped_without_memory
from stepdistill.training.phase import PhaseState, run_phase
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.preview import MAX_TEACHER_STEPS, Preview

logger = logging.getLogger(__name__)
SENSITIVITY = "sensitivity.json"
_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".msgpack", ".h5", ".pt", ".onnx", ".onnx_data"}


def make_small_base(config: RunConfig, *, began: float | None = None) -> bool:
    """Makes RUN/base, which continues from a checkpoint if there is one; False if it is finished already. ToBeContinued if
    it is asked to stop; ConfigError if the parts cannot be removed.

    began: time.monotonic() from which training.max_minutes counts; None: now.
    """
    if base_record(config) is not None:
        shutil.rmtree(work_folder(config) / CHECKPOINTS, ignore_errors=True)  # if a kill left them
        return False
    with StopRequest(max_minutes=config.training.max_minutes, began=began) as stop:
        runtime = Runtime(mixed_precision=config.training.mixed_precision)
        work = _Work.of(settled(config), runtime)
        removed = work.parts_to_remove()
        _Training(work, removed, stop).run()
        exit_code = runtime.largest(stop.exit_code)
        if exit_code:
            runtime.wait()  # a launcher ends all processes as soon as one has ended
            raise ToBeContinued(
                f"stopped ({stop.reason}) after the smaller base was written; the same command continues there",
                exit_code,
            )
    return True


@dataclass(frozen=True)
class _Work:
    """What choosing and training share.

    teacher   the original without guidance, on a network of its own
    guidance  the denoiser's fields that guide it, for previews
    """

    config: RunConfig
    runtime: Runtime
    cache: LatentCache
    teacher: Denoiser
    guidance: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig, runtime: Runtime) -> "_Work":
        release_memory()
        folder, cache = teacher_folder(config), load_cache(config)
        path, prediction_type = load_noise_path(TeacherFacts.of_folder(folder).scheduler)
        network = SharedNetwork(load_base(folder, config, runtime))
        teacher = Denoiser(network, None, path.to(runtime.device), prediction_type)
        guidance = {
            "guidance_scale": config.teacher.guidance_scale,
            "unconditional": cache.unconditional.to(runtime.device, runtime.weight_dtype),
        }
        return cls(config, runtime, cache, teacher, guidance)

    def parts_to_remove(self) -> list[str]:
        """The parts that the config names, or those that matter least; their table is printed and kept."""
        shrink = self.config.shrink
        assert shrink is not None, "only a run with a shrink section has a smaller base"
        if shrink.keep is None:
            check_removed(plain_config(self.teacher.network.model), shrink.remove)
            return list(shrink.remove)
        removed = self._chosen(shrink.keep) if self.runtime.is_main else None
        return list(Processes().broadcast(removed))  # by one process, so that all build the same network

    def _chosen(self, keep: float) -> list[str]:
        """The parts that matter least, from the table in the run's folder, which is made if it is not there."""
        path = work_folder(self.config) / SENSITIVITY
        known = read_sealed(path)
        if known is None:
            model = self.teacher.network.model
            table = list(removals(model, OutputError(model, functools.partial(_outputs, self))))
            known = {"removed": chosen(model, table, keep), "table": [r.as_dict() for r in table]}
            write_sealed(path, known)
        table = [Removal(**entry) for entry in known["table"]]
        logger.info("shrink: what each part is worth\n%s", sensitivity_table(table, known["removed"]))
        return list(known["removed"])


@torch.no_grad()
def _outputs(work: _Work, model: Any) -> Iterator[torch.Tensor]:
    """The outputs of a network on samples of the data at random timesteps, micro-batch after micro-batch."""
    config, device = work.config, work.runtime.device
    assert config.shrink is not None
    count, size = config.shrink.sensitivity_samples, config.training.train_batch_size
    for first in range(0, count, size):
        batch = draw_batch(
            work.cache,
            list(range(first, min(first + size, count))),
            noise_path=work.teacher.noise_path,
            student_steps=work.teacher.noise_path.num_train_timesteps,
            node_steps=work.teacher.noise_path.num_train_timesteps,
            seed=config.seed,
            keys=("sensitivity",),
            dtype=work.runtime.weight_dtype,
        ).to(device)
        noisy = work.teacher.noise_path.add_noise(batch.original_samples, batch.noise, batch.timesteps)
        sample = noisy.to(work.runtime.weight_dtype)
        yield kind_of(model).ask(model, sample, batch.timesteps, batch.conditioning).float()


class _Training:
    """Trains the smaller U-Net and writes it."""

    def __init__(self, work: _Work, removed: list[str], stop: StopRequest) -> None:
        self._work, self._removed, self._stop = work, removed, stop
        config, runtime = work.config, work.runtime
        whole = load_network(teacher_folder(config))  # in float32, in which its weights are trained
        self._parameters = parameters_of(whole)
        model = smaller_network(whole, removed).to(runtime.device)
        self._network = SharedNetwork.trained_whole(
            model,
            dtype=runtime.weight_dtype,
            gradient_checkpointing=config.training.gradient_checkpointing,
            compiles=config.training.compile,
            sizes_vary=len(work.cache.latent_shapes) > 1,
        )
        self._student = dataclasses.replace(work.teacher, network=self._network, adapter=STUDENT, trains=True)
        folder = work_folder(config)
        options = config.training.checkpoint
        self._resumed = newest(folder / CHECKPOINTS, self._identity)
        self._checkpoints = Checkpoints(
            folder / CHECKPOINTS,
            self._identity,
            every_minutes=options.every_minutes,
            keep=options.keep,
            seconds=0.0 if self._resumed is None else self._resumed.seconds,
        )

    def run(self) -> None:
        """Trains from the newest checkpoint, or from the start, and writes RUN/base."""
        work, runtime = self._work, self._work.runtime
        resumed = self._resumed
        if not runtime.is_same(-1 if resumed is None else resumed.step):
            raise CheckpointError(
                f"the processes of the launch read different checkpoints in {self._checkpoints.folder}; allowed: one for "
                f"all; fix: start the command again, on a file system that shows all machines the same files"
            )
        log = None
        if runtime.is_main:
            if resumed is not None:  # else damaged ones after it would count as the newest
                remove_after(self._checkpoints.folder, resumed.phase, resumed.step)
            log = TrainingLog(work_folder(work.config) / "log.jsonl")
            log.begin(
                work.teacher.noise_path.num_train_timesteps,
                phase=0,
                step=0 if resumed is None else resumed.step,
            )
            left = parameters_of(self._network.model)
            logger.info(
                "shrink: without %s %s of %s parameters are left",
                ", ".join(self._removed),
                f"{left:,}",
                f"{self._parameters:,}",
            )
        try:
            self._train(log, resumed)
        finally:
            if log is not None:
                log.close()
        if runtime.is_main:
            self._write(round(self._checkpoints.seconds, 1))
            self._checkpoints.remove()
        runtime.wait()

    def _train(self, log: TrainingLog | None, resumed: Checkpoint | None) -> None:
        latest: list[PhaseState] = []

        def between_updates(state: PhaseState, _trouble: Trouble | None) -> None:
            latest[:] = [state]
            self._save_and_stop(state, log)

        try:
            run_phase(
                self._setup(),
                runtime=self._work.runtime,
                log=log,
                start=None if resumed is None else resumed.state,
                after_update=between_updates,
            )
        except OutOfMemoryError:
            if self._work.runtime.is_main and latest:
                self._checkpoints.save(0, latest[0].step, latest[0].state_dict(), None)
                self._checkpoints.wait()
            raise

    def _setup(self) -> PhaseSetup:
        config, work = self._work.config, self._work
        assert config.shrink is not None
        rung = shrink_rung(config, TeacherFacts.of_folder(teacher_folder(config)))
        return PhaseSetup(
            rung=rung,
            phase=rung.phases[0],
            number=0,
            training=_training(config.training),
            seed=config.seed,
            student=self._student,
            teacher=work.teacher,
            discriminator=None,
            cache=work.cache,
            preview=self._preview(),
            name="shrink",
        )

    def _preview(self) -> Callable[[str, int], None]:
        """Draws the guided original above the guided smaller base, at the preview's prompts."""
        work, config = self._work, self._work.config
        folder = teacher_folder(config)
        dtype = vae_dtype(TeacherFacts.of_folder(folder), work.runtime.weight_dtype)
        painter = Painter(load_vae(folder, dtype=dtype), batch_size=config.training.train_batch_size)
        prompts, place = list(config.preview.prompts), work_folder(config) / "previews"
        preview = Preview(painter, work.cache, prompts, seed=config.seed, folder=place)
        student = dataclasses.replace(self._student, trains=False, **work.guidance)
        teacher = dataclasses.replace(work.teacher, **work.guidance)
        steps = min(config.evaluation.teacher_steps[0], MAX_TEACHER_STEPS)

        def draw(name: str, _step: int) -> None:
            if work.runtime.is_main:
                with skipped_without_memory(f"{name}.png"):
                    preview.draw(name, student, teacher, student_steps=steps, teacher_steps=steps)

        return draw

    def _identity(self, _phase: int, _step: int) -> Identity:
        config = self._work.config
        training = config.training
        samples = training.train_batch_size * training.gradient_accumulation_steps
        return Identity(
            settings=settings_of_every_rung(config),
            rungs={},
            base=fingerprint(teacher_folder(config)),
            cache=cache_hash(config),
            samples=samples * self._work.runtime.num_processes,
            versions=versions_of_training(),
        )

    def _save_and_stop(self, state: PhaseState, log: TrainingLog | None) -> None:
        """Saves a checkpoint if one is due. ToBeContinued, with a checkpoint, if training is asked to stop."""
        runtime = self._work.runtime
        exit_code = runtime.largest(self._stop.exit_code)
        if runtime.is_main and (exit_code or self._checkpoints.is_due):
            if log is not None:
                log.sync()
            self._checkpoints.save(0, state.step, state.state_dict(), None)
        if not exit_code:
            return
        failure = self._checkpoints.wait()
        is_lost = runtime.largest(int(failure is not None))
        runtime.wait()
        if is_lost:
            raise CheckpointError(
                f"stopped after update {state.step} of shrink, but its state could not be written, as the warning above "
                f"says; fix: remove the cause, then the same command, which continues from the checkpoint before"
            )
        raise ToBeContinued(
            f"stopped ({self._stop.reason}) after update {state.step} of shrink; the same command continues there",
            exit_code,
        )

    def _write(self, seconds: float) -> None:
        """Writes the smaller U-Net, in the dtype and variant of the teacher's, among copies of the teacher's other parts."""
        config, shrink = self._work.config, self._work.config.shrink
        assert shrink is not None
        original = teacher_folder(config)
        model = smaller_network(load_network(original), self._removed)
        masters = self._network.weights(STUDENT).masters()
        model.load_state_dict({name: masters[name].cpu() for name in model.state_dict()}, assign=True)
        variant = weights_variant(original)
        record = {
            "removed": self._removed,
            "parameters": parameters_of(model),
            "parameters_of_original": self._parameters,
            "max_train_steps": shrink.max_train_steps,
            "objectives": [objective.model_dump(mode="json") for objective in shrink.objectives],
            "seconds": seconds,
        }
        with whole_folder(base_folder(config)) as folder:
            _copy_other_parts(original, folder)
            model.to(_stored_dtype(original)).save_pretrained(folder / "unet", variant=variant)
            write_sealed(folder / RECORD, record)


def _copy_other_parts(pipeline: Path, target: Path) -> None:
    """Copies what model_index.json names, without the U-Net; of the weights, those that are loaded."""
    index = read_object(pipeline / "model_index.json")
    shutil.copyfile(pipeline / "model_index.json", target / "model_index.json")
    for name in (name for name in index if name != "unet" and (pipeline / name).is_dir()):
        loaded = set()
        if name in WEIGHTS:
            loaded = set(weight_files(pipeline / name, WEIGHTS[name], weights_variant(pipeline, name)))
        (target / name).mkdir()
        for file in sorted((pipeline / name).iterdir()):
            is_other_part = name not in WEIGHTS and file.suffix == ".safetensors"
            if file.is_file() and (file in loaded or is_other_part or file.suffix not in _WEIGHTS):
                shutil.copyfile(file, target / name / file.name)


def _stored_dtype(pipeline: Path) -> torch.dtype:
    """The dtype of the U-Net's weights in a pipeline's folder; one pipeline's parts must have one dtype."""
    files = weight_files(pipeline / "unet", WEIGHTS["unet"], weights_variant(pipeline))
    name, _ = next(iter(read_header(files[0]).values()))
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)


def _training(training: Training) -> Training:
    """The run's training settings with AdamW, unless a special optimiser is asked for."""
    kind = "adamw" if training.optimizer == "adam" else training.optimizer
    return training.model_copy(update={"optimizer": kind})
