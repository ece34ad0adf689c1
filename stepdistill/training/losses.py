"""The loss of each role in one update: each objective is a function of samples. No backward pass, no optimiser.

`OBJECTIVES` (config/objective_kinds.py) names the functions of each. A new one is a function in a file of its own and one
line there.
"""

import functools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from stepdistill.config import Phase
from stepdistill.config.objective_kinds import OBJECTIVES
from stepdistill.models.shared_network import STUDENT
from stepdistill.objectives import adversarial, distribution_matching, features
from stepdistill.objectives.mse import convert_loss, denoising_target, mse_loss, output_loss
from stepdistill.training.samples import Samples

Weights = Mapping[str, float | torch.Tensor]
"""Factors of the student's losses by the objective's kind; a tensor is a scalar."""


@dataclass(frozen=True)
class Loss:
    """The scalar that one role learns from, with its graph, and metrics to log."""

    value: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def mse(samples: Samples, phase: Phase) -> Loss:
    """MSE between the student's one move and the teacher's many moves (Eq 16), in the phase's loss space."""
    batch, student = samples.batch, samples.student
    target = samples.teacher_sample
    value = mse_loss(
        samples.student_sample,
        target,
        student.network_timesteps(batch.timesteps),
        batch.prev_timesteps,
        noise_path=student.noise_path,
        space=phase.loss_space_for(student.prediction_type),
    )
    return Loss(value)


def convert(samples: Samples, _phase: Phase) -> Loss:
    """MSE between the x_0 implied by the student's output, of the new type, and by the teacher's output (Eq 27-29)."""
    return Loss(convert_loss(samples.student_original, samples.teacher_original))


def output(samples: Samples, _phase: Phase) -> Loss:
    """MSE between the outputs of student and teacher at x_t (output distillation, as in BK-SDM)."""
    return Loss(output_loss(samples.student_output, samples.teacher_output))


def denoise(samples: Samples, _phase: Phase) -> Loss:
    """MSE between the student's output and the noise in the data, as in the training of any diffusion model."""
    batch, student = samples.batch, samples.student
    target = denoising_target(
        batch.original_samples,
        batch.noise,
        batch.timesteps,
        noise_path=student.noise_path,
        prediction_type=student.prediction_type,
    )
    return Loss(output_loss(samples.student_output, target))


def adversarial_discriminator(samples: Samples, phase: Phase) -> Loss:
    """D learns to tell the student's samples from real ones (Eq 18-26)."""
    options = phase.discriminator
    kind, real = options.loss, options.real
    logits = samples.logits(real=real)
    value = adversarial.discriminator_loss(logits.real, logits.student, kind=kind)
    on_real, on_student = adversarial.accuracy(logits.real.detach(), logits.student.detach(), kind=kind)
    error = (samples.student_sample.detach() - samples.real_sample(real)).square().mean()
    metrics = {"discriminator_accuracy_real": on_real, "discriminator_accuracy_student": on_student}
    metrics["mse" if real == "teacher" else "mse_to_data"] = error
    return Loss(value, metrics)


def adversarial_student(samples: Samples, phase: Phase) -> Loss:
    """The student learns to make D take its samples for real ones (Eq 18-26)."""
    options = phase.discriminator
    real_logits = samples.logits(real=options.real).real.detach()
    return Loss(
        adversarial.generator_loss(samples.student_logits(real=options.real), real_logits, kind=options.loss)
    )


def fake_score(samples: Samples, _phase: Phase) -> Loss:
    """The fake score learns to predict the noise in the student's noised x_0 (DMD, Eq 6)."""
    noised = samples.noised_original
    value = distribution_matching.fake_score_loss(
        samples.fake_output,
        noised.sample,
        noised.noise,
        noised.timesteps,
        noise_path=samples.student.noise_path,
        prediction_type=samples.fake_prediction_type,
    )
    return Loss(value)


def dmd_student(samples: Samples, _phase: Phase) -> Loss:
    """The student's images become as likely as the base's, by the difference of the two scores (DMD, Eq 7-8)."""
    real, fake = samples.real_original, samples.fake_original
    return Loss(distribution_matching.matching_loss(samples.student_original, real, fake))


def l2(samples: Samples, phase: Phase) -> Loss:
    """The relative squared error of the student's features."""
    return _at_taps(samples, phase, "l2", features.l2_distance)


def attention(samples: Samples, phase: Phase) -> Loss:
    """The distance of the spatial maps of the features' size."""
    return _at_taps(samples, phase, "attention", features.attention_distance)


def gram(samples: Samples, phase: Phase) -> Loss:
    """The relative squared error of the Gram matrices of the features' channels."""
    return _at_taps(samples, phase, "gram", features.gram_distance)


def kernel(samples: Samples, phase: Phase) -> Loss:
    """How unlike the student's features are the teacher's, by a kernel."""
    kind = phase.options_of("kernel").kernel
    return _at_taps(samples, phase, "kernel", functools.partial(features.kernel_distance, kind=kind))


def relations(samples: Samples, phase: Phase) -> Loss:
    """How the relations between patches, or between samples, differ."""
    between = {"patches": features.patch_relations, "samples": features.sample_relations}
    return _at_taps(samples, phase, "relations", between[phase.options_of("relations").between])


def _at_taps(
    samples: Samples,
    phase: Phase,
    kind: str,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Loss:
    """The mean over the taps of an objective of the distance between the student's features and the teacher's."""
    names = samples.student.network.modules_at(phase.options_of(kind).taps)
    student, teacher = samples.student_features, samples.teacher_features
    return Loss(torch.stack([distance(student[name], teacher[name]) for name in names]).mean())


@functools.cache
def _function(name: str) -> Callable[[Samples, Phase], Loss]:
    return pkgutil.resolve_name(name)


def roles_of(phase: Phase) -> tuple[str, ...]:
    """The roles that learn in a phase, in the order of their backward passes.

    The critics come first: the student's losses need D's logits of real samples, and what the fake score predicts. All
    losses use the same weights, because the optimisers step after all backward passes.
    """
    return (*phase.critics, STUDENT)


def learning_roles(phase: Phase, step: int) -> tuple[str, ...]:
    """Those of `roles_of` that learn in update `step`, counted from 0: the critics alone in some updates."""
    return roles_of(phase) if phase.student_learns_at(step) else phase.critics


def losses_of(role: str, samples: Samples, phase: Phase) -> dict[str, Loss]:
    """The loss of each objective that has one for this role, without its weight, by the objective's kind."""
    losses = {}
    for objective in phase.weighted:
        kind = OBJECTIVES[objective.kind]
        name = kind.student_loss if role == STUDENT else kind.critic_loss
        if name is not None and role in (STUDENT, kind.critic):
            losses[objective.kind] = _function(name)(samples, phase)
    assert losses, f"no objective of the phase has a loss for the {role}"
    return losses


def loss_of(role: str, samples: Samples, phase: Phase, weights: Weights | None = None) -> Loss:
    """The loss of one role: the sum over the phase's objectives, the student's multiplied by `weights`.

    weights: by the objective's kind; default: those of the phase's first update.
    """
    return summed(role, losses_of(role, samples, phase), weights or phase.weights_at(0))


def summed(role: str, losses: Mapping[str, Loss], weights: Weights) -> Loss:
    """The sum of the losses of one role; those of critics have no weights.

    With several objectives the metrics also hold the student loss of each one without its weight, such as "mse_loss".
    """
    total: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = {}
    for kind, loss in losses.items():
        metrics |= loss.metrics
        value = loss.value
        if role == STUDENT:
            if len(losses) > 1:
                metrics[f"{kind}_loss"] = value.detach()
            weight = weights[kind]
            if isinstance(weight, torch.Tensor) or weight != 1.0:
                value = weight * value
        total = value if total is None else total + value
    assert total is not None
    return Loss(total, metrics)
