"""What one update computes: samples of teacher and student, and the losses between them. No backward, no optimiser."""

from dataclasses import dataclass, field

import torch

from stepdistill.config import Phase
from stepdistill.data.batches import Batch
from stepdistill.diffusion.prediction import convert
from stepdistill.diffusion.schedule import NoiseSchedule, substep_path
from stepdistill.diffusion.solver import guide, move, rollout
from stepdistill.ladder_checks import loss_space_of
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.roles import Roles
from stepdistill.objectives import adversarial
from stepdistill.objectives.mse import convert_loss, mse_loss


@dataclass(frozen=True)
class Denoisers:
    """Teacher and student on the shared U-Net, with what it takes to ask them: guidance is the first rung's teacher's.

    start_timestep: what the student is told with pure noise (DMD2's conditioning timestep); None is the last one.
    """

    roles: Roles
    schedule: NoiseSchedule
    unconditional: Conditioning
    teacher_prediction_type: str
    student_prediction_type: str
    guidance_scale: float
    start_timestep: int | None = None

    def told(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The timesteps (B,) that the student is told at its own: start_timestep at the last one."""
        if self.start_timestep is None:
            return timesteps
        return torch.where(timesteps == self.schedule.last_timestep, self.start_timestep, timesteps)


@dataclass(frozen=True)
class StepResult:
    """Scalars with a graph to call backward on, by role; and numbers for the log."""

    losses: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def noisy_latents(nets: Denoisers, batch: Batch) -> torch.Tensor:
    """x_t (B, C, H, W): noised data, and the noise itself at the last timestep (Eq 24)."""
    return nets.schedule.add_noise(
        batch.original_samples, batch.noise, batch.timesteps, pure_noise_at_last=True
    )


def teacher_rollout(
    nets: Denoisers, sample: torch.Tensor, path: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The teacher's moves along path (B, K + 1), without gradient; guided where guidance_scale > 1. (B, C, H, W)."""

    def predict(rows: torch.Tensor, state: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        told = conditioning.rows(rows)
        if nets.guidance_scale == 1.0:
            return nets.roles.predict(state, timesteps, told)
        both = Conditioning.concat(nets.unconditional.beside(told), told)
        output = nets.roles.predict(torch.cat([state, state]), torch.cat([timesteps, timesteps]), both)
        uncond, cond = output.chunk(2)
        return guide(uncond, cond, nets.guidance_scale)

    with nets.roles.teacher():
        return rollout(
            predict, sample, path, schedule=nets.schedule, prediction_type=nets.teacher_prediction_type
        )


def _teacher_path(nets: Denoisers, batch: Batch, teacher_steps: int) -> torch.Tensor:
    return substep_path(
        batch.timesteps,
        batch.prev_timesteps,
        teacher_steps,
        num_train_timesteps=nets.schedule.num_train_timesteps,
    )


def student_move(nets: Denoisers, sample: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The student's one move from timesteps to prev_timesteps, with its graph. (B, C, H, W)."""
    timesteps = nets.told(batch.timesteps)
    with nets.roles.student():
        output = nets.roles.predict(sample, timesteps, batch.conditioning)
    return move(
        output,
        sample,
        timesteps,
        batch.prev_timesteps,
        schedule=nets.schedule,
        prediction_type=nets.student_prediction_type,
    )


def mse_step(
    nets: Denoisers,
    batch: Batch,
    *,
    teacher_steps: int,
    loss_space: str,
    known: dict[int, torch.Tensor] | None = None,
    number: int = 0,
) -> StepResult:
    """One move against the teacher's many (Eq 16). known: the teacher's samples by `number`, looked up and added to."""
    sample = noisy_latents(nets, batch)
    target = None if known is None else known.get(number)
    if target is None:
        path = _teacher_path(nets, batch, teacher_steps)
        target = teacher_rollout(nets, sample, path, batch.conditioning)
        if known is not None:
            known[number] = target
    loss = mse_loss(
        student_move(nets, sample, batch),
        target,
        nets.told(batch.timesteps),
        batch.prev_timesteps,
        schedule=nets.schedule,
        space=loss_space,
    )
    return StepResult({"student": loss})


def convert_step(nets: Denoisers, batch: Batch) -> StepResult:
    """The x_0 that the student's output of the new kind implies, against the x_0 that the frozen copy of what it was implies
    (Eq 27-29, where the output is x_0 itself)."""
    sample = noisy_latents(nets, batch)
    originals = []
    for role, kind, timesteps in (
        (nets.roles.teacher, nets.teacher_prediction_type, batch.timesteps),
        (nets.roles.student, nets.student_prediction_type, nets.told(batch.timesteps)),
    ):
        with role():
            output = nets.roles.predict(sample, timesteps, batch.conditioning)
        originals.append(
            convert(output, sample, timesteps, schedule=nets.schedule, prediction_type=kind, target="sample")
        )
    return StepResult({"student": convert_loss(originals[1], originals[0])})


def adversarial_step(
    nets: Denoisers,
    discriminator: Discriminator,
    batch: Batch,
    *,
    teacher_steps: int,
    perturbation_weights: list[float],
    loss: str = "non_saturating",
    real: str = "teacher",
) -> StepResult:
    """Losses of D and of the student on one shared batch (Eq 18-26).

    real: "teacher" (the paper's) or "data": x_0 noised to s with the noise of x_t, so that real and fake share x_t where
    that is no pure noise; the teacher is not asked then, and the student is drawn to the data rather than to the teacher.
    Both are taken against the same D, so an update does not depend on how a batch is split. D sees detached samples;
    the student's loss goes through a D whose parameters take no gradient; x_t's features are computed once.
    """
    roles, schedule = nets.roles, nets.schedule
    sample = noisy_latents(nets, batch)
    if real == "teacher":
        path = _teacher_path(nets, batch, teacher_steps)
        real_sample = teacher_rollout(nets, sample, path, batch.conditioning)
    else:
        real_sample = schedule.add_noise(batch.original_samples, batch.noise, batch.prev_timesteps)
    student_sample = student_move(nets, sample, batch)
    seen_at = adversarial.draw_perturbation(
        batch.prev_timesteps,
        batch.perturbation_uniform,
        weights=perturbation_weights,
        num_train_timesteps=schedule.num_train_timesteps,
    )
    real_seen, student_seen = (
        adversarial.perturb(x, batch.perturbation_noise, batch.prev_timesteps, seen_at, schedule=schedule)
        for x in (real_sample, student_sample)
    )

    with roles.discriminator(trainable=True):
        context = None
        if discriminator.paired:
            context = discriminator.features(sample, batch.timesteps, batch.conditioning)
        both = discriminator.features(
            torch.cat([real_seen, student_seen.detach()]),
            torch.cat([seen_at, seen_at]),
            Conditioning.concat(batch.conditioning, batch.conditioning),
        )
        twice = None if context is None else [torch.cat([f, f]) for f in context]
        real_logits, student_logits = discriminator.logits(both, twice).chunk(2)
        discriminator_loss = adversarial.discriminator_loss(real_logits, student_logits, kind=loss)

    with roles.discriminator(trainable=False):
        features = discriminator.features(student_seen, seen_at, batch.conditioning)
        still = None if context is None else [f.detach() for f in context]
        generator_loss = adversarial.generator_loss(
            discriminator.logits(features, still), real_logits.detach(), kind=loss
        )

    right_on_teacher, right_on_student = adversarial.accuracy(
        real_logits.detach(), student_logits.detach(), kind=loss
    )
    return StepResult(
        {"discriminator": discriminator_loss, "student": generator_loss},
        {
            "discriminator_accuracy_teacher": right_on_teacher,
            "discriminator_accuracy_student": right_on_student,
            "mse" if real == "teacher" else "mse_to_data": (student_sample.detach() - real_sample)
            .square()
            .mean(),
        },
    )


def phase_step(
    nets: Denoisers,
    batch: Batch,
    phase: Phase,
    *,
    teacher_steps: int,
    discriminator: Discriminator | None,
    known: dict[int, torch.Tensor] | None = None,
    number: int = 0,
) -> StepResult:
    """The step that a phase's objective names."""
    if phase.objective == "mse":
        space = loss_space_of(phase, nets.student_prediction_type)
        return mse_step(
            nets, batch, teacher_steps=teacher_steps, loss_space=space, known=known, number=number
        )
    if phase.objective == "convert":
        return convert_step(nets, batch)
    assert discriminator is not None, "an adversarial phase has a discriminator"
    return adversarial_step(
        nets,
        discriminator,
        batch,
        teacher_steps=teacher_steps,
        perturbation_weights=list(phase.discriminator.perturbation_weights),
        loss=phase.discriminator.loss,
        real=phase.discriminator.real,
    )
