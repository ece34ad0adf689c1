"""The samples and logits that the losses of one update need; each is computed once, on first use."""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from stepdistill.data.batches import Batch
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.scores import Scores
from stepdistill.models.shared_network import STUDENT, TEACHER, as_map
from stepdistill.objectives.adversarial import perturb


@dataclass(frozen=True)
class Logits:
    """D's logits of real samples and of the student's, each (B, heads), with D's graph and detached from the student's."""

    real: torch.Tensor
    student: torch.Tensor


@dataclass(frozen=True)
class Noised:
    """The student's x_0, noised for the scores: x_tau (B, C, H, W), without gradients, and its noise and timesteps tau."""

    sample: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


class Samples:
    """x_t of a micro-batch, and what teacher, student and critics compute from it.

    Args:
        batch: the micro-batch.
        student: runs with gradients, unless the update is one of the critics alone.
        teacher: runs without gradients.
        discriminator: needed in an adversarial phase.
        scores: needed for distribution matching.
        teacher_samples: samples to reuse, by the number of their micro-batch; new ones are added. None: no reuse.
        number: the number of this micro-batch in teacher_samples.
        taps: where the features of student and teacher at x_t are kept (models/network: `modules_at`).
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: Denoiser,
        teacher: Denoiser,
        discriminator: Discriminator | None = None,
        scores: Scores | None = None,
        teacher_samples: MutableMapping[int, torch.Tensor] | None = None,
        number: int = 0,
        taps: Sequence[str] = (),
    ) -> None:
        self.batch, self.student, self.teacher = batch, student, teacher
        self._discriminator, self._scores = discriminator, scores
        self._teacher_samples, self._number = teacher_samples, number
        self._logits: dict[str, Logits] = {}
        self._taps = student.network.modules_at(taps)
        self._features: dict[str, dict[str, torch.Tensor]] = {}
        self._context: list[torch.Tensor] | None = None  # a paired D's features of x_t, detached

    @cached_property
    def noisy(self) -> torch.Tensor:
        """x_t (B, C, H, W): noised data, or the noise itself at the last timestep (Eq 24). With the student's own inputs:
        where its own steps lead from the noise, without gradients."""
        batch = self.batch
        if batch.own_moves is None:
            return self.student.noise_path.add_noise(
                batch.original_samples, batch.noise, batch.timesteps, pure_noise_at_last=True
            )
        with torch.no_grad():
            return self.student.rollout(batch.noise, batch.own_moves, batch.conditioning)

    @cached_property
    def student_output(self) -> torch.Tensor:
        """What the network gives the student at x_t, (B, C, H, W): one pass, however many objectives ask."""
        seen = self.student.network_timesteps(self.batch.timesteps)
        noisy = self.noisy
        with self._kept_features(STUDENT):
            return self.student.output(noisy, seen, self.batch.conditioning)

    @cached_property
    def student_sample(self) -> torch.Tensor:
        """x_s (B, C, H, W), with gradients: the student's one move from timesteps to prev_timesteps."""
        batch = self.batch
        return self.student.moved(self.student_output, self.noisy, batch.timesteps, batch.prev_timesteps)

    @cached_property
    def teacher_sample(self) -> torch.Tensor:
        """x_s (B, C, H, W), without gradients: where the teacher's many moves lead from the same x_t."""
        if self._teacher_samples is not None and self._number in self._teacher_samples:
            return self._teacher_samples[self._number]
        moves, noisy = self.batch.teacher_moves, self.noisy
        assert moves is not None, "an objective that asks for the teacher's samples draws the teacher's moves"
        with self._kept_features(TEACHER):
            sample = self.teacher.rollout(noisy, moves, self.batch.conditioning)
        if self._teacher_samples is not None:
            self._teacher_samples[self._number] = sample
        return sample

    @cached_property
    def data_sample(self) -> torch.Tensor:
        """x_0 noised to s with the noise of x_t, (B, C, H, W): it belongs to the student's x_t unless that is pure noise."""
        batch = self.batch
        return self.student.noise_path.add_noise(batch.original_samples, batch.noise, batch.prev_timesteps)

    def real_sample(self, real: str) -> torch.Tensor:
        """The samples that D counts as real, (B, C, H, W): "teacher" (the paper's) or "data", which needs no teacher."""
        return self.teacher_sample if real == "teacher" else self.data_sample

    @cached_property
    def teacher_output(self) -> torch.Tensor:
        """What the teacher predicts at x_t, (B, C, H, W), expressed in what the student predicts, without gradients."""
        return self._teacher_prediction(self.student.prediction_type)

    @cached_property
    def teacher_original(self) -> torch.Tensor:
        """x_0 (B, C, H, W) that the teacher predicts from x_t, without gradients."""
        return self._teacher_prediction("sample")

    def _teacher_prediction(self, target: str) -> torch.Tensor:
        noisy, batch = self.noisy, self.batch
        with self._kept_features(TEACHER):
            return self.teacher.predict(noisy, batch.timesteps, batch.conditioning, target=target)

    @cached_property
    def student_original(self) -> torch.Tensor:
        """x_0 (B, C, H, W) that the student predicts from x_t, with gradients."""
        return self.student.converted(self.student_output, self.noisy, self.batch.timesteps, target="sample")

    @cached_property
    def noised_original(self) -> Noised:
        """The student's x_0 as the two scores see it."""
        score = self.batch.score
        assert score is not None, "distribution matching draws noise for the scores"
        original = self.student_original.detach()
        noisy = self.student.noise_path.add_noise(original, score.noise, score.timesteps)
        return Noised(noisy, score.noise, score.timesteps)

    @cached_property
    def fake_output(self) -> torch.Tensor:
        """What the network gives the fake score at x_tau (B, C, H, W), with the fake score's gradients."""
        noised, fake = self.noised_original, self._both_scores.fake
        return fake.output(noised.sample, noised.timesteps, self.batch.conditioning)

    @cached_property
    def fake_original(self) -> torch.Tensor:
        """x_0 (B, C, H, W) that the fake score predicts from x_tau, without gradients."""
        noised, fake = self.noised_original, self._both_scores.fake
        return fake.converted(self.fake_output.detach(), noised.sample, noised.timesteps, target="sample")

    @cached_property
    def real_original(self) -> torch.Tensor:
        """x_0 (B, C, H, W) that the base with guidance predicts from x_tau, without gradients."""
        noised, real = self.noised_original, self._both_scores.real
        return real.predict(noised.sample, noised.timesteps, self.batch.conditioning, target="sample")

    @property
    def fake_prediction_type(self) -> str:
        """What the network predicts as the fake score."""
        return self._both_scores.fake.prediction_type

    @property
    def _both_scores(self) -> Scores:
        assert self._scores is not None, "distribution matching has two scores"
        return self._scores

    @property
    def student_features(self) -> dict[str, torch.Tensor]:
        """The student's features (B, C, H, W) at x_t by the names of modules, with gradients; no pass of their own."""
        if STUDENT not in self._features:
            _ = self.student_output
        return self._features[STUDENT]

    @property
    def teacher_features(self) -> dict[str, torch.Tensor]:
        """The teacher's features (B, C, H, W) at x_t by the names of modules: those of its first move, with the prompts. If
        no objective needs its moves, it makes one prediction."""
        if TEACHER not in self._features:
            _ = self.teacher_output if self.batch.teacher_moves is None else self.teacher_sample
        return self._features[TEACHER]

    @contextmanager
    def _kept_features(self, role: str) -> Iterator[None]:
        """Keeps the features of the first pass inside it, unless the role's are kept already or none are asked for."""
        if not self._taps:  # as with several teachers, which have no one network
            yield
            return
        rows = len(self.batch.timesteps)
        network = (self.student if role == STUDENT else self.teacher).tapped_network
        with network.tapped(self._taps) as outputs:
            yield
        # a guided pass has the rows without prompts first
        self._features.setdefault(role, {name: as_map(output[-rows:]) for name, output in outputs.items()})

    def logits(self, *, real: str) -> Logits:
        """D's logits of real samples ("teacher" or "data") and the student's; clean ones are perturbed first (Eq 25-26)."""
        if real not in self._logits:
            self._logits[real] = self._logits_against(real)
        return self._logits[real]

    def student_logits(self, *, real: str) -> torch.Tensor:
        """D's logits of the student's samples, (B, heads), with the student's graph and D frozen; call `logits` before.

        They are computed apart from `logits`, so that D's graph can be freed before.
        """
        discriminator, batch = self._discriminator, self.batch
        assert discriminator is not None, "an adversarial objective has a discriminator"
        assert batch.perturbation is not None, "an adversarial objective draws a perturbation"
        assert real in self._logits, "the discriminator's loss comes first"
        with discriminator.active(trains=False):
            times = self.student.noise_path.network_times(batch.perturbation.timesteps)
            features = discriminator.features(self._perturbed(self.student_sample), times, batch.conditioning)
            return discriminator.logits(features, self._context)

    def _logits_against(self, real: str) -> Logits:
        discriminator, batch = self._discriminator, self.batch
        assert discriminator is not None, "an adversarial objective has a discriminator"
        real_seen, student_seen = (
            self._perturbed(x) for x in (self.real_sample(real), self.student_sample.detach())
        )
        assert batch.perturbation is not None, "an adversarial objective draws a perturbation"
        network_times = self.student.noise_path.network_times
        seen_at = network_times(batch.perturbation.timesteps)
        with discriminator.active(trains=True):
            context = None
            if discriminator.paired:
                context = discriminator.features(
                    self.noisy, network_times(batch.timesteps), batch.conditioning
                )
                self._context = [f.detach() for f in context]
            both = discriminator.features(
                torch.cat([real_seen, student_seen]),
                torch.cat([seen_at, seen_at]),
                Conditioning.concat(batch.conditioning, batch.conditioning),
            )
            twice = None if context is None else [torch.cat([f, f]) for f in context]
            return Logits(*discriminator.logits(both, twice).chunk(2))

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
