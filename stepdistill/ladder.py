"""The rungs in order, each the next one's teacher."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.data.cache import LatentCache, load_cache
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.durable import sha256_file, writing
from stepdistill.fork import take_rungs
from stepdistill.ladder_checks import prediction_types
from stepdistill.models import adapters
from stepdistill.models.discriminator import DiscriminatorState, build_discriminator
from stepdistill.models.loading import (
    fingerprint,
    load_schedule,
    load_unet,
    load_vae,
    read_scheduler_config,
    vae_dtype,
)
from stepdistill.models.lora_file import write_lora
from stepdistill.models.roles import STUDENT, TEACHER, Roles
from stepdistill.rng import derive_seed
from stepdistill.rungs import WEIGHT_NAME, RungRecord, read_rung, rung_folder
from stepdistill.runtime import Runtime, release_memory
from stepdistill.teacher_source import teacher_folder
from stepdistill.training.log import TrainingLog
from stepdistill.training.phase_looks import BaseTeacher, PhaseLooks
from stepdistill.training.pictures import Painter
from stepdistill.training.preview import MOST_TEACHER_STEPS, Preview
from stepdistill.training.stage import Stage, run_stage
from stepdistill.training.steps import Denoisers

logger = logging.getLogger(__name__)
_UNET_PREFIX = "unet."


@dataclass(frozen=True)
class Shared:
    """What all rungs of a run share."""

    config: RunConfig
    base: Path
    roles: Roles
    schedule: NoiseSchedule
    base_prediction_type: str
    cache: LatentCache
    painter: Painter
    looks: PhaseLooks
    runtime: Runtime


def distill(config: RunConfig, *, only: tuple[int, int] | None = None) -> list[int]:
    """Trains the rungs that are not finished, in order; returns the student_steps of those it trained.

    Args:
        config: the run; its cache must be prepared.
        only: (teacher_steps, student_steps) of one rung to train, its predecessors finished; it is trained anew.
    """
    todo = [r for r in config.ladder if only is None or (r.teacher_steps, r.student_steps) == only]
    if not todo:
        known = ", ".join(f"{r.teacher_steps}:{r.student_steps}" for r in config.ladder)
        raise ValueError(
            f"--rung: got {only[0]}:{only[1]}; allowed: {known}" if only else "the ladder is empty"
        )
    take_rungs(config)
    if only is None:
        todo = _unfinished(config)
    if not todo:
        return []
    runtime = Runtime(mixed_precision=config.training.mixed_precision)
    shared = load_shared(config, runtime)
    log = None
    if runtime.is_main:
        _warn_of_bursts(shared)
        log = TrainingLog(config.run_dir / "log.jsonl", drop_rungs={r.student_steps for r in todo})
    for rung in todo:
        _train_rung(shared, rung, log)
    if log is not None:
        log.close()
    return [rung.student_steps for rung in todo]


def _unfinished(config: RunConfig) -> list[Rung]:
    for index, rung in enumerate(config.ladder):
        if read_rung(config.run_dir, rung.student_steps) is None:
            return list(config.ladder[index:])
    return []


def load_shared(config: RunConfig, runtime: Runtime) -> Shared:
    """The base U-Net with its roles, the cache and what else all rungs need; models of earlier stages are freed first."""
    release_memory()
    base = teacher_folder(config)
    unet = load_unet(base, dtype=runtime.weight_dtype, quantization=config.training.base_quantization).to(
        runtime.device
    )
    schedule, prediction_type = load_schedule(read_scheduler_config(base))
    roles = Roles(
        unet,
        rank=config.lora.rank,
        seed=derive_seed(config.seed, "lora"),
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    painter = Painter(
        load_vae(base, dtype=vae_dtype(base, runtime.weight_dtype)),
        batch_size=config.training.train_batch_size,
        autocast=runtime.autocast,
    )
    cache = load_cache(config)
    steps = min(config.evaluation.teacher_steps[0], MOST_TEACHER_STEPS)
    teacher = BaseTeacher(prediction_type, config.teacher.guidance_scale, steps)
    looks = PhaseLooks(painter, cache, teacher, images=config.preview.looks_images, seed=config.seed)
    return Shared(config, base, roles, schedule, prediction_type, cache, painter, looks, runtime)


def _warn_of_bursts(shared: Shared) -> None:
    """Where fewer pictures than an update takes have a size: several processes train on what one prepared."""
    training, sizes = shared.config.training, shared.cache.sizes
    group = training.train_batch_size * training.gradient_accumulation_steps * shared.runtime.num_processes
    few = sum(count for count in sizes.values() if count < group)
    if few and len(sizes) > 1:
        logger.warning(
            "distill: %d of %d pictures have a size that fewer than the %d samples of an update have: each comes several "
            "times in one update and not at all in many others; mend: data.min_per_bucket=%d and another name=...",
            few,
            len(shared.cache),
            group,
            group,
        )


def _train_rung(shared: Shared, rung: Rung, log: TrainingLog | None) -> None:
    config, roles = shared.config, shared.roles
    position = config.ladder.index(rung)
    kinds = prediction_types(config, shared.base_prediction_type)
    started = time.monotonic()
    if position:
        adapters.load_adapter_state(roles.unet, STUDENT, read_lora(config.run_dir, rung.teacher_steps))
    partial = config.run_dir / "rungs" / f".{rung.student_steps}.partial"
    if shared.runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        with writing(partial):
            partial.mkdir(parents=True)
    shared.runtime.wait()
    preview = Preview(
        shared.painter,
        shared.cache,
        list(config.preview.prompts),
        seed=config.seed,
        folder=partial / "previews",
    )
    learned: DiscriminatorState | None = None
    for number, phase in enumerate(rung.phases):
        learned = _train_phase(shared, rung, number, phase, kinds, preview, log, learned) or learned
    shared.runtime.wait()
    if shared.runtime.is_main:
        save_lora(roles, partial)
        record = RungRecord(
            student_steps=rung.student_steps,
            teacher_steps=rung.teacher_steps,
            prediction_type=kinds[position],
            lora_rank=config.lora.rank,
            base_fingerprint=fingerprint(shared.base),
            sha256=sha256_file(partial / WEIGHT_NAME),
            training_seconds=round(time.monotonic() - started, 1),
            start_timestep=rung.start_timestep,
        )
        record.write(partial)
        final = rung_folder(config.run_dir, rung.student_steps)
        with writing(final):
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    shared.runtime.wait()


def _train_phase(
    shared: Shared,
    rung: Rung,
    number: int,
    phase: Phase,
    kinds: list[str],
    preview: Preview,
    log: TrainingLog | None,
    learned: DiscriminatorState | None,
) -> DiscriminatorState | None:
    """Trains one phase. Takes what D learned in the phases before on this rung, and returns what it has learned now, where a
    later phase carries that on."""
    config, roles = shared.config, shared.roles
    students = [r.student_steps for r in config.ladder]
    earlier = students[: students.index(rung.student_steps)]
    teacher_steps = phase.teacher_steps or rung.teacher_steps
    roles.teacher_is_base = teacher_steps not in earlier
    teacher_kind = shared.base_prediction_type
    if not roles.teacher_is_base:
        adapters.load_adapter_state(roles.unet, TEACHER, read_lora(config.run_dir, teacher_steps))
        teacher_kind = kinds[students.index(teacher_steps)]
    nets = Denoisers(
        roles=roles,
        schedule=shared.schedule,
        unconditional=shared.cache.unconditional.to(shared.runtime.device, shared.runtime.weight_dtype),
        teacher_prediction_type=teacher_kind,
        student_prediction_type=kinds[students.index(rung.student_steps)],
        guidance_scale=config.teacher.guidance_scale if roles.teacher_is_base else 1.0,
        start_timestep=rung.start_timestep,
    )
    discriminator = build_discriminator(
        roles,
        phase,
        base=shared.base,
        rank=config.lora.rank,
        seed=derive_seed(config.seed, rung.student_steps, number, "discriminator"),
        sample_size=shared.cache.smallest_side,
        carried=learned,
    )

    def draw(name: str) -> None:
        if shared.runtime.is_main:
            preview.draw(name, nets, teacher_steps=teacher_steps, student_steps=rung.student_steps)

    stage = Stage(
        rung, phase, number, config.training, config.seed, nets, discriminator, shared.cache, preview=draw
    )
    run_stage(stage, runtime=shared.runtime, log=log)
    if shared.runtime.is_main:
        path = preview.folder / f"phase{number}-{phase.objective}-end.json"
        shared.looks.write(path, nets, steps=rung.student_steps)
    carries_on = any(p.discriminator.start == "carried" for p in rung.phases[number + 1 :])
    learned = discriminator.state() if discriminator is not None and carries_on else None
    roles.drop_discriminator()
    return learned


def save_lora(roles: Roles, folder: Path) -> None:
    """Writes the student's LoRA."""
    state = adapters.adapter_state(roles.unet, STUDENT)
    write_lora(folder, state, adapters.adapter_metadata(roles.unet, STUDENT))


def read_lora(run_dir: Path, student_steps: int) -> dict:
    """The weights of a finished rung's LoRA under peft's keys."""
    if read_rung(run_dir, student_steps) is None:
        raise ValueError(
            f"the {student_steps}-step rung in {run_dir} is missing or changed; `stepdistill distill` makes it anew"
        )
    return read_lora_file(rung_folder(run_dir, student_steps) / WEIGHT_NAME)


def read_lora_file(path: Path) -> dict:
    """The weights of a file that `save_lora` wrote, under peft's keys."""
    state = load_file(path)
    return {key.removeprefix(_UNET_PREFIX): tensor for key, tensor in state.items()}


@torch.no_grad()
def seconds_per_forward(config: RunConfig) -> float:
    """Seconds of one U-Net forward with a LoRA per sample, here, at the training batch size: the faster of three."""
    runtime = Runtime(mixed_precision=config.training.mixed_precision)
    unet = load_unet(
        teacher_folder(config),
        dtype=runtime.weight_dtype,
        quantization=config.training.base_quantization,
    ).to(runtime.device)
    roles = Roles(unet, rank=config.lora.rank, seed=0)
    cache = load_cache(config)
    size, count = max(cache.sizes.items(), key=lambda item: item[1])
    samples = cache.samples(size, [k % count for k in range(config.training.train_batch_size)])
    sample = samples.latents.to(runtime.device)
    told = samples.conditioning.to(runtime.device, runtime.weight_dtype)
    timesteps = torch.full((len(sample),), 500, device=runtime.device)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        with runtime.autocast(), roles.student():
            roles.predict(sample, timesteps, told)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return min(seconds) / len(sample)
