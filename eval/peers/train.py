"""The peers' training, each within the package's U-Net, roles, cache, optimiser and randomness by index."""

from pathlib import Path

import torch

from stepdistill.config import RunConfig
from stepdistill.data.batches import Batch
from stepdistill.durable import sha256_file
from stepdistill.ladder import read_lora_file
from stepdistill.models import adapters
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.discriminator import Head, encode
from stepdistill.models.roles import STUDENT
from stepdistill.rng import derive_seed

from . import dmd2, lcm
from .loop import Loop, is_finished

FAKE = "fake_score"


def train_lcm(config: RunConfig, folder: Path, *, updates: int, learning_rate: float) -> None:
    """An LCM-LoRA in `folder`; nothing where a finished one with these settings is there."""
    if is_finished(folder, updates=updates, learning_rate=learning_rate, start=None):
        return
    loop = Loop(config, ("lcm",), lcm.NODES)
    shared, roles = loop.shared, loop.shared.roles
    optimizer = loop.optimizer(roles.student_parameters, learning_rate, updates)
    with loop.progress("LCM-LoRA", updates) as bar:
        for step in range(updates):
            batch = loop.batch(step)
            sample = shared.schedule.add_noise(batch.original_samples, batch.noise, batch.timesteps)

            def student(
                x: torch.Tensor, t: torch.Tensor, told: Conditioning = batch.conditioning
            ) -> torch.Tensor:
                with roles.student():
                    return roles.predict(x, t, told)

            loss = lcm.consistency_loss(
                student,
                student,
                loop.guided(batch.conditioning),
                sample,
                batch.timesteps,
                schedule=shared.schedule,
                prediction_type=shared.base_prediction_type,
            )
            bar.update(step + 1, {"loss": loop.update(optimizer, loss)})
    loop.finish(folder, updates=updates, learning_rate=learning_rate, start=None, forwards=lcm.FORWARDS)


class Dmd2:
    """Student, fake score and head of one step count, with the two updates that DMD2 takes in turn.

    Args:
        config: the run.
        steps: N, the student's nodes.
        updates: of the student.
        learning_rate: of all three.
        start: the LoRA that the student begins with; the base where not given.
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
        self.shared, self.roles, self.steps = loop.shared, loop.shared.roles, steps
        seed = derive_seed(config.seed, "dmd2", steps)
        if start is not None:
            adapters.load_adapter_state(self.roles.unet, STUDENT, start)
        fake_parameters = self.roles.add_role(FAKE, rank=config.lora.rank, seed=seed)
        widths = self.roles.unet.config.block_out_channels
        size = self.shared.cache.smallest_side >> (len(widths) - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(widths[-1], widths[-1], max(1, size)).to(self.shared.runtime.device)
        self.critics = [*fake_parameters, *self.head.parameters()]
        self.of_student = loop.optimizer(self.roles.student_parameters, learning_rate, updates)
        self.of_critics = loop.optimizer(self.critics, learning_rate, updates * dmd2.FAKE_UPDATES)
        self.nodes = dmd2.nodes(steps).to(self.shared.runtime.device)

    def update_critics(self, number: int) -> float:
        """The fake score on samples of the student, the head on these and on data; returns the loss."""
        batch, noise, timesteps = self._draw(number)
        told, schedule = batch.conditioning, self.shared.schedule
        noisy = schedule.add_noise(self._samples(number, batch), noise, timesteps)
        with self.roles.role(FAKE):
            output = self.roles.predict(noisy, timesteps, told)
        kind = self.shared.base_prediction_type
        score = dmd2.fake_score_loss(output, noisy, noise, timesteps, schedule=schedule, prediction_type=kind)
        data = schedule.add_noise(batch.original_samples, noise, timesteps)
        critic = dmd2.critic_loss(self._logits(data, timesteps, told), self._logits(noisy, timesteps, told))
        return self.loop.update(self.of_critics, score + dmd2.CRITIC_GAN_WEIGHT * critic)

    def update_student(self, number: int) -> float:
        """Distribution matching and the head's verdict; returns the loss."""
        batch, noise, timesteps = self._draw(number)
        told, schedule, guided = (
            batch.conditioning,
            self.shared.schedule,
            self.loop.guided(batch.conditioning),
        )

        def real(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.loop.original(guided(x, t), x, t)

        def fake(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.roles.role(FAKE):
                return self.loop.original(self.roles.predict(x, t, told), x, t)

        original = self._samples(number, batch, gradient=True)
        matching = dmd2.distribution_matching_loss(original, real, fake, timesteps, noise, schedule=schedule)
        for parameter in self.critics:
            parameter.requires_grad_(False)
        gan = dmd2.generator_gan_loss(
            self._logits(schedule.add_noise(original, noise, timesteps), timesteps, told)
        )
        loss = self.loop.update(self.of_student, matching + dmd2.GENERATOR_GAN_WEIGHT * gan)
        for parameter in self.critics:
            parameter.requires_grad_(True)
        return loss

    def _draw(self, number: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """A batch, and the noise (B, C, H, W) and timesteps (B,) that scores are compared at."""
        low, high = dmd2.SCORE_RANGE
        timesteps = (low + self.loop.uniform(number, "score timestep") * (high - low)).long()
        return self.loop.batch(number), self.loop.normal(number, "score noise"), timesteps

    def _samples(self, number: int, batch: Batch, *, gradient: bool = False) -> torch.Tensor:
        """The student's x_0 (B, C, H, W) at random ones of its nodes, reached by its own roll-out."""
        noises = torch.stack([self.loop.normal(number, f"node {k}") for k in range(self.steps)])
        stops = (self.loop.uniform(number, "stop") * self.steps).long().clamp(max=self.steps - 1)

        def generate(rows: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.roles.student():
                return self.loop.original(self.roles.predict(x, t, batch.conditioning.rows(rows)), x, t)

        inputs = dmd2.backward_simulation(generate, noises, self.nodes, stops, schedule=self.shared.schedule)
        every = torch.arange(len(stops), device=stops.device)
        with torch.set_grad_enabled(gradient):
            return generate(every, inputs, self.nodes[stops])

    def _logits(self, sample: torch.Tensor, timesteps: torch.Tensor, told: Conditioning) -> torch.Tensor:
        unet = self.roles.unet
        with self.roles.role(FAKE):
            return self.head(encode(unet, sample.to(unet.dtype), timesteps, told)[-1].float())


def train_dmd2(
    config: RunConfig,
    folder: Path,
    *,
    steps: int,
    updates: int,
    learning_rate: float,
    start: Path | None = None,
) -> None:
    """A DMD2-LoRA for `steps` steps in `folder`, from the LoRA file `start` or the base; nothing where a finished one with
    these settings is there."""
    started_from = None if start is None else sha256_file(start)
    if is_finished(folder, updates=updates, learning_rate=learning_rate, start=started_from):
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
    peer.loop.finish(folder, updates=updates, learning_rate=learning_rate, start=started_from, forwards=cost)
