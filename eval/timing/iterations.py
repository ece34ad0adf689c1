"""An iteration of each kind of phase against its bare passes: the network alone on the same micro-batch.

Bare are the teacher's evaluations, one LoRA forward and backward pass of the student, and the encoder passes of the
discriminator: 4 if it is paired, 3 if it is single.
"""

import statistics

import torch

from stepdistill.config import Phase, RunConfig
from stepdistill.diffusion.grid import passes_per_step
from stepdistill.models.shared_network import STUDENT
from stepdistill.plan import phase_forwards
from stepdistill.runtime import Runtime
from stepdistill.training.phase import losses_and_gradients
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.samples import Samples

from .clock import Action, medians, rounds
from .phases import first_batch, phase_setup

PHASES = (("mse", 0), ("mse", 1), ("paired", 1), ("single", 1), ("mse", 2))
"""Objective and rung."""


def iterations(config: RunConfig, count: int) -> list[dict[str, object]]:
    """A row per kind of phase: seconds of an iteration and of its bare passes, and their ratio."""
    return [_iteration(config, Phase(objective=objective), rung, count) for objective, rung in PHASES]


def _iteration(config: RunConfig, phase: Phase, rung_index: int, count: int) -> dict[str, object]:
    setup = phase_setup(config, rung_index, phase, Runtime())
    rung, batch = setup.rung, first_batch(setup)

    def iteration() -> None:
        samples = Samples(
            batch,
            student=setup.student,
            teacher=setup.teacher,
            discriminator=setup.discriminator,
            taps=phase.taps,
        )
        losses_and_gradients(samples, phase, torch.Tensor.backward)

    times = {"teacher": rung.teacher_steps // rung.student_steps, "student": 1}
    times["teacher"] *= passes_per_step(setup.teacher.guidance_scale)
    if setup.discriminator is not None:
        times["discriminator"] = 4 if setup.discriminator.paired else 3
    timed = rounds({"iteration": iteration} | _bare_passes(setup), count)
    bare = [sum(times[role] * each[role] for role in times) for each in timed]
    return {
        "rung": f"{rung.teacher_steps} -> {rung.student_steps}",
        "objective": phase.title,
        "batch": len(batch.noise),
        "planned_forwards": round(phase_forwards(config, rung, phase), 2),
        "iteration_seconds": round(medians(timed)["iteration"], 4),
        "bare_seconds": round(statistics.median(bare), 4),
        "ratio": round(
            statistics.median(each["iteration"] / b for each, b in zip(timed, bare, strict=True)), 3
        ),
    }


def _bare_passes(setup: PhaseSetup) -> dict[str, Action]:
    """One pass of each role."""
    batch, network = first_batch(setup), setup.student.network
    inputs = (batch.noise, batch.timesteps, batch.conditioning)
    discriminator = setup.discriminator

    def teacher_pass() -> None:
        with torch.no_grad(), network.using(setup.teacher.adapter):
            network.ask(*inputs)

    def student_pass() -> None:
        with network.using(STUDENT):
            network.ask(*inputs).square().mean().backward()

    passes: dict[str, Action] = {"teacher": teacher_pass, "student": student_pass}
    if discriminator is None:
        return passes

    def encoder_pass() -> None:
        with discriminator.active(trains=True):
            x = batch.noise.clone().requires_grad_(True)
            discriminator.features(x, batch.timesteps, batch.conditioning)[-1].square().mean().backward()

    return passes | {"discriminator": encoder_pass}
