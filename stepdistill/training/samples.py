"""What the losses of one update are made of: each sample is computed once, when it is first asked for."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property

import torch

from stepdistill.data.batches import Batch
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.objectives.adversarial import perturb


@dataclass(frozen=True)
class Logits:
    """What D says of one update, each (B, heads).

    real, student  with D's graph and detached samples, for D's loss
    generated      of the student's samples, with the student's graph and a frozen D, for the student's loss
    """

    real: torch.Tensor
    student: torch.Tensor
    generated: torch.Tensor


class Samples:
    """x_t of a micro-batch and what teacher, student and discriminator make of it.

    Args:
        batch: the micro-batch.
        student: with gradients.
        teacher: without.
        discriminator: of an adversarial phase.
        teacher_samples: of earlier micro-batches by number, looked up and added to.
        number: of this micro-batch.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: Discriminator | None = None,
        teacher_samples: MutableMapping[int, torch.Tensor] | None = None,
        number: int = 0,
    ) -> None:
        self.batch, self.student, self.teacher = batch, student, teacher
        self._discriminator, self._teacher_samples, self._number = discriminator, teacher_samples, number
        self._logits: dict[str, Logits] = {}

    @cached_property
    def noisy(self) -> torch.Tensor:
        """x_t (B, C, H, W): noised data, and the noise itself at the last timestep (Eq 24)."""
        batch = self.batch
        return self.student.noise_path.add_noise(
            batch.original_samples, batch.noise, batch.timesteps, pure_noise_at_last=True
        )

    @cached_property
    def student_sample(self) -> torch.Tensor:
        """The student's one move from timesteps to prev_timesteps, with its graph, (B, C, H, W)."""
        batch = self.batch
        return self.student.move(self.noisy, batch.timesteps, batch.prev_timesteps, batch.conditioning)

    @cached_property
    def teacher_sample(self) -> torch.Tensor:
        """Where the teacher's many moves lead from the same x_t, without gradient, (B, C, H, W)."""
        if self._teacher_samples is not None and self._number in self._teacher_samples:
            return self._teacher_samples[self._number]
        moves = self.batch.teacher_moves
        assert moves is not None, "an objective that asks for the teacher's samples draws the teacher's moves"
        sample = self.teacher.rollout(self.noisy, moves, self.batch.conditioning)
        if self._teacher_samples is not None:
            self._teacher_samples[self._number] = sample
        return sample

    @cached_property
    def data_sample(self) -> torch.Tensor:
        """x_0 noised to s with the same noise as x_t, (B, C, H, W): real and student samples share x_t unless that is pure
        noise."""
        batch = self.batch
        return self.student.noise_path.add_noise(batch.original_samples, batch.noise, batch.prev_timesteps)

    def real_sample(self, real: str) -> torch.Tensor:
        """What D takes for real, (B, C, H, W): "teacher" (the paper's) or "data", for which the teacher is not asked."""
        return self.teacher_sample if real == "teacher" else self.data_sample

    @cached_property
    def teacher_original(self) -> torch.Tensor:
        """x_0 that the teacher predicts at x_t, without gradient, (B, C, H, W)."""
        return self._original_by(self.teacher)

    @cached_property
    def student_original(self) -> torch.Tensor:
        """x_0 that the student predicts at x_t, with its graph, (B, C, H, W)."""
        return self._original_by(self.student)

    def _original_by(self, denoiser: Denoiser) -> torch.Tensor:
        return denoiser.predict(self.noisy, self.batch.timesteps, self.batch.conditioning, target="sample")

    def logits(self, *, real: str) -> Logits:
        """D's logits of real samples ("teacher" or "data") and of the student's, perturbed where they are clean (Eq 25-26).

        D's loss and the student's use the same D, so an update does not depend on how a batch is split.
        """
        if real not in self._logits:
            self._logits[real] = self._logits_against(real)
        return self._logits[real]

    def _logits_against(self, real: str) -> Logits:
        """The features of x_t are computed once for both losses."""
        discriminator, batch = self._discriminator, self.batch
        assert discriminator is not None, "an adversarial objective has a discriminator"
        real_seen, student_seen = (self._perturbed(x) for x in (self.real_sample(real), self.student_sample))
        assert batch.perturbation is not None, "an adversarial objective draws a perturbation"
        seen_at = batch.perturbation.timesteps
        with discriminator.active(trains=True):
            context = None
            if discriminator.paired:
                context = discriminator.features(self.noisy, batch.timesteps, batch.conditioning)
            both = discriminator.features(
                torch.cat([real_seen, student_seen.detach()]),
                torch.cat([seen_at, seen_at]),
                Conditioning.concat(batch.conditioning, batch.conditioning),
            )
            twice = None if context is None else [torch.cat([f, f]) for f in context]
            real_logits, student_logits = discriminator.logits(both, twice).chunk(2)
        with discriminator.active(trains=False):
            features = discriminator.features(student_seen, seen_at, batch.conditioning)
            still = None if context is None else [f.detach() for f in context]
            generated = discriminator.logits(features, still)
        return Logits(real_logits, student_logits, generated)

    def _perturbed(self, sample: torch.Tensor) -> torch.Tensor:
        perturbation = self.batch.perturbation
        assert perturbation is not None, "an adversarial objective draws a perturbation"
        return perturb(
            sample,
            perturbation.noise,
            self.batch.prev_timesteps,
            perturbation.timesteps,
            noise_path=self.student.noise_path,
        )
