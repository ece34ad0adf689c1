"""The network of a run with random weights, and a random micro-batch, on any device: what an update needs but the data.

On the meta device nothing has values (dry_update.py); on a real one an update can be timed (real_update.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.data.batches import Batch, Perturbation
from stepdistill.data.buckets import Sizes
from stepdistill.diffusion.noise_path import Move
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import build_network, kind_of_facts
from stepdistill.models.scores import Scores, build_scores
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork
from stepdistill.plan.passes import is_base_teacher
from stepdistill.runtime import WEIGHT_DTYPES
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import load_noise_path
from stepdistill.teacher.quantization import quantization_config


@dataclass(frozen=True)
class _Inputs:
    """Shapes of a micro-batch: rows, (C, h, w) of latents, and what the teacher's configs say of the text."""

    batch: int
    latent: tuple[int, int, int]
    facts: TeacherFacts
    dtype: torch.dtype

    def conditioning(self, rows: int) -> Conditioning:
        return kind_of_facts(self.facts).random_conditioning(self.facts, rows, dtype=self.dtype)

    def micro_batch(
        self,
        *,
        has_teacher: bool = False,
        is_adversarial: bool = False,
        has_scores: bool = False,
        from_own: bool = False,
    ) -> Batch:
        rows, shape = self.batch, (self.batch, *self.latent)
        timesteps, ends = (torch.full((rows,), at, dtype=torch.int64) for at in (499, 249))
        return Batch(
            original_samples=torch.randn(shape),
            noise=torch.randn(shape),
            timesteps=timesteps,
            prev_timesteps=ends,
            conditioning=self.conditioning(rows),
            teacher_moves=[Move(None, timesteps, ends)] if has_teacher else None,
            perturbation=Perturbation(timesteps, torch.randn(shape)) if is_adversarial else None,
            score=Perturbation(timesteps, torch.randn(shape)) if has_scores else None,
            own_moves=[Move(None, torch.full_like(timesteps, 999), timesteps)] if from_own else None,
        )


def _as_in_the_run(model: torch.nn.Module, config: RunConfig) -> torch.nn.Module:
    """The base model quantised and in the memory format that the run sets."""
    training = config.training
    if training.base_quantization != "none":
        from torchao.quantization import quantize_

        quantize_(model, quantization_config(training.base_quantization))
    if training.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@dataclass(frozen=True)
class _KnownEnd(VariancePreserving):
    """A noise path that is told whether it ends in pure noise: its tensor may have no values to look at."""

    ends_in_pure_noise: bool = False


class Rehearsal:
    """Network and inputs of a run.

    Args:
        config: the run.
        facts: the teacher's configs.
        device: where everything is.
        is_real: the device computes, so the base is quantised, in the memory format, and compiled as in the run. What is
            counted on the meta device is the eager code of a plain base.
    """

    def __init__(self, config: RunConfig, facts: TeacherFacts, *, device: str, is_real: bool = False) -> None:
        self.config, self.facts, self.device = config, facts, device
        dtype = WEIGHT_DTYPES[config.training.mixed_precision]
        size = Sizes(config.data, teacher_size=facts.image_size, multiple=facts.size_multiple).target
        batch, latent = config.training.train_batch_size, facts.latent_shape(size)
        self.inputs = _Inputs(batch=batch, latent=latent, facts=facts, dtype=dtype)
        with torch.device(device):
            model = build_network(facts)
        for tensor in (*model.parameters(), *model.buffers()):  # SD3 has a table of positions
            tensor.data = tensor.data.to(dtype)
        if is_real:
            model = _as_in_the_run(model, config)
        with torch.device(device):
            self.network = SharedNetwork.with_student_and_teacher(
                model,
                rank=config.lora.rank,
                seed=0,
                gradient_checkpointing=config.training.gradient_checkpointing,
                compiles=is_real and config.training.compile,
            )
        self._path, _ = load_noise_path(facts.scheduler_at(size))
        if isinstance(self._path, VariancePreserving):
            self._path = _KnownEnd(self._path.alphas_cumprod.to(device), facts.is_zero_snr)

    @contextmanager
    def critics_of(self, phase: Phase) -> Iterator[tuple[Discriminator | None, Scores | None]]:
        """The discriminator and the scores that a phase needs, inside the context."""
        discriminator = self._discriminator(phase)
        scores = build_scores(phase, self._undistilled(), rank=self.config.lora.rank, seed=0)
        try:
            yield discriminator, scores
        finally:
            for critic in (discriminator, scores):
                if critic is not None:
                    critic.close()

    def micro_batch(self, phase: Phase) -> Batch:
        """A micro-batch with one move of the teacher, if the phase asks for its moves, and one of the student's own before
        it, if the phase begins with them."""
        return self.inputs.micro_batch(
            has_teacher=phase.needs_teacher_moves,
            is_adversarial=phase.adversary is not None,
            has_scores=phase.matches_distributions,
            from_own=phase.inputs == "own",
        )

    def denoisers(self, rung: Rung, phase: Phase) -> tuple[Denoiser, Denoiser]:
        """Student and teacher of a phase."""
        kind = self.facts.prediction_type
        student = Denoiser(
            self.network, STUDENT, self._path, kind, start_timestep=rung.start_timestep, trains=True
        )
        if not is_base_teacher(self.config, rung, phase):
            return student, Denoiser(self.network, TEACHER, self._path, kind)
        return student, self._undistilled()

    def on_networks(self, student: SharedNetwork, teacher: SharedNetwork) -> tuple[Denoiser, Denoiser]:
        """A student that is a whole network, and a teacher that is another one, without guidance."""
        kind = self.facts.prediction_type
        return Denoiser(student, STUDENT, self._path, kind, trains=True), Denoiser(
            teacher, None, self._path, kind
        )

    def _undistilled(self) -> Denoiser:
        """The base model with guidance."""
        return Denoiser(
            self.network,
            None,
            self._path,
            self.facts.prediction_type,
            guidance_scale=self.config.teacher.guidance_scale,
            unconditional=self.inputs.conditioning(1),
        )

    def _discriminator(self, phase: Phase) -> Discriminator | None:
        if phase.adversary is None:
            return None
        options, base = phase.discriminator, None
        if options.trunk == "full":
            base = build_network(self.facts)
        return Discriminator(
            self.network,
            trunk=options.trunk,
            heads=options.heads,
            head_width=options.head_width,
            paired=phase.adversary == "paired",
            rank=self.config.lora.rank,
            seed=0,
            sample_size=min(self.inputs.latent[1:]),
            base=base,
        )
