"""The losses of one update: each objective is a function of samples. No backward pass, no optimiser.

`OBJECTIVES` (config/objective_kinds.py) names the function of each. A new one is a function in a file of its own and one
line there.
"""

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from stepdistill.config import Phase
from stepdistill.config.objective_kinds import OBJECTIVES
from stepdistill.objectives import adversarial
from stepdistill.objectives.mse import convert_loss, mse_loss
from stepdistill.training.samples import Samples


@dataclass(frozen=True)
class Losses:
    """Scalar losses with their graphs, by the role that learns from them ("student", "discriminator"); metrics to log."""

    by_role: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def mse(samples: Samples, phase: Phase) -> Losses:
    """MSE between the student's one move and the teacher's many moves (Eq 16), in the phase's loss space."""
    batch, student = samples.batch, samples.student
    target = samples.teacher_sample
    loss = mse_loss(
        samples.student_sample,
        target,
        student.network_timesteps(batch.timesteps),
        batch.prev_timesteps,
        noise_path=student.noise_path,
        space=phase.loss_space_for(student.prediction_type),
    )
    return Losses({"student": loss})


def convert(samples: Samples, _phase: Phase) -> Losses:
    """MSE between the x_0 implied by the student's output, of the new type, and by the teacher's output (Eq 27-29)."""
    return Losses({"student": convert_loss(samples.student_original, samples.teacher_original)})


def adversarial_pair(samples: Samples, phase: Phase) -> Losses:
    """D learns to tell the student's samples from real ones; the student learns to make D take them for real (Eq 18-26)."""
    options = phase.discriminator
    kind, real = options.loss, options.real
    logits = samples.logits(real=real)
    of_discriminator = adversarial.discriminator_loss(logits.real, logits.student, kind=kind)
    of_student = adversarial.generator_loss(logits.student_frozen, logits.real.detach(), kind=kind)
    on_real, on_student = adversarial.accuracy(logits.real.detach(), logits.student.detach(), kind=kind)
    error = (samples.student_sample.detach() - samples.real_sample(real)).square().mean()
    metrics = {"discriminator_accuracy_real": on_real, "discriminator_accuracy_student": on_student}
    metrics["mse" if real == "teacher" else "mse_to_data"] = error
    return Losses({"discriminator": of_discriminator, "student": of_student}, metrics)


@functools.cache
def function_of(kind: str) -> Callable[[Samples, Phase], Losses]:
    """The function that computes an objective."""
    return pkgutil.resolve_name(OBJECTIVES[kind].losses)


def losses_of(samples: Samples, phase: Phase) -> Losses:
    """The losses of a phase's objectives, summed by role; the student's are multiplied by their objective's weight.

    With several objectives the metrics also hold the unweighted student loss of each one, such as "mse_loss".
    """
    by_role: dict[str, torch.Tensor] = {}
    metrics: dict[str, torch.Tensor] = {}
    for objective in phase.weighted:
        losses = function_of(objective.kind)(samples, phase)
        metrics |= losses.metrics
        if len(phase.weighted) > 1:
            metrics[f"{objective.kind}_loss"] = losses.by_role["student"].detach()
        for role, loss in losses.by_role.items():
            if role == "student" and objective.weight != 1.0:
                loss = objective.weight * loss
            by_role[role] = by_role[role] + loss if role in by_role else loss
    return Losses(by_role, metrics)
