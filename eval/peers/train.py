"""Training of LCM-LoRA and DMD2-LoRA, with the network, cache, optimiser and indexed randomness of the package."""

import dataclasses
from pathlib import Path

import torch

from stepdistill.config import RunConfig
from stepdistill.data.batches import Batch
from stepdistill.disk.durable import sha256_file
from stepdistill.ladder import read_lora_file
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Head
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT
from stepdistill.objectives.distribution_matching import fake_score_loss
from stepdistill.rng import derive_seed

from . import dmd2, lcm
from .loop import Loop, is_finished

FAKE = "fake_score"


def train_lcm(config: RunConfig, folder: Path, *, updates: int, learning_rate: float) -> None:
    """Trains an LCM-LoRA into `folder`, unless `folder` has a finished one with these settings."""
    if is_finished(folder, updates=updates, learning_rate=learning_rate, start=None):
        return
    loop = Loop(config, ("lcm",), lcm.NODES)
    shared, student, teacher = loop.shared, loop.student, loop.shared.undistilled
    optimizer = loop.optimizer(shared.network.weights(STUDENT), learning_rate, updates)
    with loop.progress("LCM-LoRA", updates) as bar:
        for step in range(updates):
            batch = loop.batch(step)
            sample = shared.noise_path.add_noise(batch.original_samples, batch.noise, batch.timesteps)
            student_output = _output(student, batch.conditioning)
            loss = lcm.consistency_loss(
                student_output,
                student_output,
                _output(teacher, batch.conditioning),
                sample,
                batch.timesteps,
                noise_path=shared.noise_path,
                prediction_type=teacher.prediction_type,
            )
            bar.update(step + 1, {"loss": loop.update(optimizer, loss)})
    loop.finish(folder, updates=updates, learning_rate=learning_rate, start=None, forwards=lcm.FORWARDS)


def _output(denoiser: Denoiser, conditioning: Conditioning) -> lcm.Model:
    """The denoiser's output as a function of samples and timesteps, with fixed conditioning."""
    return lambda sample, timesteps: denoiser.output(sample, timesteps, conditioning)


class Dmd2:
    """Student, fake score and head for one step count, with the two updates between which DMD2 alternates.

    Args:
        config: the run.
        steps: N, the number of the student's nodes.
        updates: number of student updates.
        learning_rate: for student, fake score and head.
        start: LoRA weights that the student starts from; None for the base.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        steps: int,
        updates: int,
        learning_rate: float,
        start: dict[str, torch.Tensor] | None,
    ) -> None:
        self.loop = loop = Loop(config, ("dmd2", steps), steps)
        self.shared, self.steps = loop.shared, steps
        network = self.shared.network
        seed = derive_seed(config.seed, "dmd2", steps)
        if start is not None:
            network.load_adapter_state(STUDENT, start)
        fake_parameters = network.add_adapter(FAKE, rank=config.lora.rank, seed=seed)
        self.student = loop.student
        self.fake = dataclasses.replace(self.student, adapter=FAKE)
        channels, size = network.kind.feature_shapes(network.model, self.shared.cache.smallest_side)[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(channels, channels, size).to(self.shared.runtime.device)
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        self.critics = fake_parameters | head
        network.set_group(FAKE, self.critics, float32=head)
        self.student_optimizer = loop.optimizer(network.weights(STUDENT), learning_rate, updates)
        self.critic_optimizer = loop.optimizer(
            network.weights(FAKE), learning_rate, updates * dmd2.FAKE_UPDATES
        )
        self.nodes = dmd2.nodes(steps).to(self.shared.runtime.device)

    def update_critics(self, number: int) -> float:
        """Trains the fake score on student samples, and the head on student samples and data; returns the loss."""
        batch, noise, timesteps = self._draw(number)
        noise_path = self.shared.noise_path
        noisy = noise_path.add_noise(self._samples(number, batch), noise, timesteps)
        score = fake_score_loss(
            self.fake.output(noisy, timesteps, batch.conditioning),
            noisy,
            noise,
            timesteps,
            noise_path=noise_path,
            prediction_type=self.fake.prediction_type,
        )
        data = noise_path.add_noise(batch.original_samples, noise, timesteps)
        critic = dmd2.critic_loss(*(self._logits(x, timesteps, batch.conditioning) for x in (data, noisy)))
        return self.loop.update(self.critic_optimizer, score + dmd2.CRITIC_GAN_WEIGHT * critic)

    def update_student(self, number: int) -> float:
        """Trains the student by distribution matching and the adversarial loss; returns the loss."""
        batch, noise, timesteps = self._draw(number)
        noise_path = self.shared.noise_path

        def original_by(denoiser: Denoiser) -> dmd2.Original:
            return lambda x, t: denoiser.predict(x, t, batch.conditioning, target="sample")

        original = self._samples(number, batch, gradient=True)
        matching = dmd2.distribution_matching_loss(
            original,
            original_by(self.shared.undistilled),
            original_by(self.fake),
            timesteps,
            noise,
            noise_path=noise_path,
        )
        for parameter in self.critics.values():
            parameter.requires_grad_(False)
        noisy = noise_path.add_noise(original, noise, timesteps)
        gan = dmd2.generator_gan_loss(self._logits(noisy, timesteps, batch.conditioning))
        loss = self.loop.update(self.student_optimizer, matching + dmd2.GENERATOR_GAN_WEIGHT * gan)
        for parameter in self.critics.values():
            parameter.requires_grad_(True)
        return loss

    def _draw(self, number: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """A batch, and the noise (B, C, H, W) and timesteps (B,) at which the scores are compared."""
        low, high = dmd2.SCORE_RANGE
        timesteps = (low + self.loop.uniform(number, "score timestep") * (high - low)).long()
        return self.loop.batch(number), self.loop.normal(number, "score noise"), timesteps

    def _samples(self, number: int, batch: Batch, *, gradient: bool = False) -> torch.Tensor:
        """The student's x_0 (B, C, H, W) at random nodes, which it reaches by backward simulation."""
        noises = torch.stack([self.loop.normal(number, f"node {k}") for k in range(self.steps)])
        stops = (self.loop.uniform(number, "stop") * self.steps).long().clamp(max=self.steps - 1)

        def generate(rows: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.student.predict(x, t, batch.conditioning.rows(rows), target="sample")

        inputs = dmd2.backward_simulation(
            generate, noises, self.nodes, stops, noise_path=self.shared.noise_path
        )
        all_rows = torch.arange(len(stops), device=stops.device)
        with torch.set_grad_enabled(gradient):
            return generate(all_rows, inputs, self.nodes[stops])

    def _logits(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        network = self.shared.network
        with network.using(FAKE):
            features = network.kind.features(network.model, sample, timesteps, conditioning)
        return self.head(features[-1].float())


def train_dmd2(
    config: RunConfig,
    folder: Path,
    *,
    steps: int,
    updates: int,
    learning_rate: float,
    start: Path | None = None,
) -> None:
    """Trains a DMD2-LoRA for `steps` steps into `folder`, starting from the LoRA file `start` or from the base.

    Does nothing if `folder` has a finished one with these settings.
    """
    start_hash = None if start is None else sha256_file(start)
    if is_finished(folder, updates=updates, learning_rate=learning_rate, start=start_hash):
        return
    weights = None if start is None else read_lora_file(start)
    peer = Dmd2(config, steps=steps, updates=updates, learning_rate=learning_rate, start=weights)
    with peer.loop.progress(f"DMD2-LoRA {steps}", updates) as bar:
        for step in range(updates):
            first = step * (dmd2.FAKE_UPDATES + 1)
            critics = [peer.update_critics(first + k) for k in range(dmd2.FAKE_UPDATES)]
            loss = peer.update_student(first + dmd2.FAKE_UPDATES)
            bar.update(step + 1, {"loss": loss, "fake loss": critics[-1]})
    cost = dmd2.forwards(steps)
    peer.loop.finish(folder, updates=updates, learning_rate=learning_rate, start=start_hash, forwards=cost)
