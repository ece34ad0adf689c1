"""A phase of the config's ladder before its first update, as training sets it up, with untrained students."""

import dataclasses

import torch

from stepdistill.config import Phase, RunConfig
from stepdistill.data.batches import Batch, draw_batch
from stepdistill.ladder import load_shared
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import build_discriminator
from stepdistill.models.shared_network import STUDENT, TEACHER
from stepdistill.runtime import Runtime
from stepdistill.training.phase import PhaseState
from stepdistill.training.phase_setup import PhaseSetup


def phase_setup(config: RunConfig, rung_index: int, phase: Phase, runtime: Runtime) -> PhaseSetup:
    """A phase of a rung. The first rung's teacher is the guided base; that of others is an untrained adapter."""
    shared = load_shared(config, runtime)
    undistilled = shared.undistilled
    kind = undistilled.prediction_type
    student = Denoiser(shared.network, STUDENT, shared.noise_path, kind, trains=True)
    teacher = dataclasses.replace(student, adapter=TEACHER, trains=False) if rung_index else undistilled
    discriminator = build_discriminator(
        shared.network,
        phase,
        base=shared.base,
        rank=config.lora.rank,
        seed=0,
        sample_size=shared.cache.smallest_side,
    )
    return PhaseSetup(
        rung=config.ladder[rung_index],
        phase=phase,
        number=0,
        training=config.training,
        seed=config.seed,
        student=student,
        teacher=teacher,
        discriminator=discriminator,
        cache=shared.cache,
        preview=lambda _name, _step: None,
    )


def phase_state(
    config: RunConfig, rung_index: int, phase: Phase, runtime: Runtime
) -> tuple[PhaseSetup, PhaseState]:
    """A phase and its state before the first update."""
    setup = phase_setup(config, rung_index, phase, runtime)
    return setup, PhaseState(setup, runtime)


def first_batch(setup: PhaseSetup) -> Batch:
    """The first micro-batch of a phase, drawn as in training."""
    rung, phase = setup.rung, setup.phase
    return draw_batch(
        setup.cache,
        list(range(setup.training.train_batch_size)),
        noise_path=setup.student.noise_path,
        student_steps=rung.student_steps,
        node_steps=rung.student_steps,
        teacher_steps=rung.teacher_steps,
        perturbation_weights=phase.discriminator.perturbation_weights,
        seed=0,
        keys=("bench",),
        dtype=torch.float32,
    ).to(setup.student.network.device)
