"""The peers' training loops, on this package's U-Net, roles, cache, optimiser and randomness by index."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill import rng
from stepdistill.config import RunConfig
from stepdistill.data.batches import Batch, draw_batch
from stepdistill.diffusion.prediction import convert
from stepdistill.diffusion.schedule import trailing_timesteps
from stepdistill.diffusion.solver import guide
from stepdistill.durable import write_json
from stepdistill.ladder import Shared, load_shared, save_lora
from stepdistill.models import adapters
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.discriminator import Head, encode
from stepdistill.models.roles import STUDENT
from stepdistill.rng import derive_seed
from stepdistill.runtime import Runtime
from stepdistill.training.log import PhaseProgress
from stepdistill.training.optim import RoleOptimizer

from . import dmd2, lcm

FAKE = "fake_score"


@dataclass(frozen=True)
class Loop:
    """What the loops share: `nodes` is the grid that batches are drawn from, `keys` names their randomness."""

    shared: Shared
    keys: tuple[rng.Key, ...]
    nodes: int

    def batch(self, step: int) -> Batch:
        """The batch of one update."""
        shared, size = self.shared, self.shared.config.training.train_batch_size
        return draw_batch(
            shared.cache,
            list(range(step * size, (step + 1) * size)),
            student_steps=self.nodes,
            node_steps=self.nodes,
            seed=shared.config.seed,
            keys=self.keys,
            device=shared.runtime.device,
            dtype=shared.runtime.weight_dtype,
        )

    def uniform(self, step: int, name: str) -> torch.Tensor:
        """(B,) in [0, 1)."""
        size, seed = self.shared.config.training.train_batch_size, self.shared.config.seed
        indices = list(range(step * size, (step + 1) * size))
        return rng.uniform(indices, seed=seed, keys=(*self.keys, name)).to(self.shared.runtime.device)

    def normal(self, step: int, name: str) -> torch.Tensor:
        """(B, C, H, W)."""
        size, seed = self.shared.config.training.train_batch_size, self.shared.config.seed
        indices = list(range(step * size, (step + 1) * size))
        shape = tuple(self.shared.cache.latents.shape[1:])
        return rng.normal(shape, indices, seed=seed, keys=(*self.keys, name)).to(self.shared.runtime.device)

    def optimizer(
        self, parameters: list[torch.nn.Parameter], learning_rate: float, updates: int
    ) -> RoleOptimizer:
        """As every method here has it: Adam, the config's warm-up and decay."""
        training = self.shared.config.training
        return RoleOptimizer(
            parameters,
            learning_rate=learning_rate,
            adversarial=False,
            max_train_steps=updates,
            lr_warmup_steps=training.lr_warmup_steps,
            lr_final_fraction=training.lr_final_fraction,
        )

    def update(self, optimizer: RoleOptimizer, loss: torch.Tensor) -> float:
        """One clipped update; returns the loss."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(self.shared.config.training.max_grad_norm)
        optimizer.step()
        return loss.item()

    def progress(self, title: str, updates: int) -> Iterator[tuple[int, Callable[[dict[str, float]], None]]]:
        """Update numbers, each with a way to show its figures."""
        every = self.shared.config.training.logging_steps
        with PhaseProgress(title, updates, logging_steps=every, enabled=True) as bar:
            for step in range(updates):
                yield step, lambda numbers, step=step: bar.update(step + 1, numbers)

    def guided(self, conditioning: Conditioning) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The base model's guided output."""
        roles, scale = self.shared.roles, self.shared.config.teacher.guidance_scale
        unconditional = self.shared.cache.unconditional.to(
            self.shared.runtime.device, self.shared.runtime.weight_dtype
        )

        def output(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            both = Conditioning.concat(unconditional.expand(len(sample)), conditioning)
            with roles.teacher():
                found = roles.predict(torch.cat([sample, sample]), torch.cat([timesteps, timesteps]), both)
            return guide(*found.chunk(2), scale)

        return output

    def original(self, output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_0 that a model output of the base's kind implies."""
        return convert(
            output,
            sample,
            timesteps,
            schedule=self.shared.schedule,
            prediction_type=self.shared.base_prediction_type,
            target="sample",
        )


def train_lcm(config: RunConfig, folder: Path, *, updates: int, learning_rate: float) -> None:
    """An LCM-LoRA in `folder`; nothing where a finished one is there."""
    if (folder / "peer.json").is_file():
        return
    began = time.monotonic()
    shared = load_shared(config, Runtime(mixed_precision=config.training.mixed_precision))
    loop, roles = Loop(shared, ("lcm",), lcm.NODES), shared.roles
    optimizer = loop.optimizer(roles.student_parameters, learning_rate, updates)
    for step, show in loop.progress("LCM-LoRA", updates):
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
        show({"loss": loop.update(optimizer, loss)})
    _finish(shared, folder, began, updates=updates, learning_rate=learning_rate, forwards=lcm.FORWARDS)


def train_dmd2(
    config: RunConfig,
    folder: Path,
    *,
    steps: int,
    updates: int,
    learning_rate: float,
    start: dict[str, torch.Tensor] | None = None,
) -> None:
    """A DMD2-LoRA for `steps` steps in `folder`, from the LoRA `start` or the base; nothing where a finished one is."""
    if (folder / "peer.json").is_file():
        return
    began = time.monotonic()
    shared = load_shared(config, Runtime(mixed_precision=config.training.mixed_precision))
    roles, schedule, device = shared.roles, shared.schedule, shared.runtime.device
    loop = Loop(shared, ("dmd2", steps), steps)
    seed = derive_seed(config.seed, "dmd2", steps)
    if start is not None:
        adapters.load_adapter_state(roles.unet, STUDENT, start)
    fake_parameters = roles.add_role(FAKE, rank=config.lora.rank, seed=seed)
    width, size = roles.unet.config.block_out_channels[-1], min(shared.cache.latents.shape[-2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(width, width, max(1, size >> (len(roles.unet.config.block_out_channels) - 1))).to(device)
    critics = [*fake_parameters, *head.parameters()]
    student_optimizer = loop.optimizer(roles.student_parameters, learning_rate, updates)
    critic_optimizer = loop.optimizer(critics, learning_rate, updates * dmd2.FAKE_UPDATES)
    nodes = trailing_timesteps(steps).to(device)
    low, high = dmd2.SCORE_RANGE

    def generate(rows: torch.Tensor, x: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        with roles.student():
            return loop.original(roles.predict(x, t, told.rows(rows)), x, t)

    def logits(x: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        with roles.role(FAKE):
            return head(encode(roles.unet, x.to(roles.unet.dtype), t, told)[-1].float())

    def samples(number: int, batch: Batch, *, gradient: bool) -> torch.Tensor:
        told, rows = batch.conditioning, torch.arange(len(batch.noise), device=device)
        noises = torch.stack([loop.normal(number, f"node {k}") for k in range(steps)])
        stops = (loop.uniform(number, "stop") * steps).long().clamp(max=steps - 1)
        inputs = dmd2.backward_simulation(
            lambda r, x, t: generate(r, x, t, told), noises, nodes, stops, schedule=schedule
        )
        with torch.set_grad_enabled(gradient):
            return generate(rows, inputs, nodes[stops], told)

    for step, show in loop.progress(f"DMD2-LoRA {steps}", updates):
        numbers: dict[str, float] = {}
        for k in range(dmd2.FAKE_UPDATES + 1):
            number = step * (dmd2.FAKE_UPDATES + 1) + k
            batch = loop.batch(number)
            told, noise = batch.conditioning, loop.normal(number, "score noise")
            timesteps = (low + loop.uniform(number, "score timestep") * (high - low)).long()
            last = k == dmd2.FAKE_UPDATES
            original = samples(number, batch, gradient=last)
            noisy = schedule.add_noise(original, noise, timesteps)
            if not last:
                with roles.role(FAKE):
                    output = roles.predict(noisy, timesteps, told)
                score = dmd2.fake_score_loss(
                    output,
                    noisy,
                    noise,
                    timesteps,
                    schedule=schedule,
                    prediction_type=shared.base_prediction_type,
                )
                data = schedule.add_noise(batch.original_samples, noise, timesteps)
                critic = dmd2.critic_loss(logits(data, timesteps, told), logits(noisy, timesteps, told))
                loss = score + dmd2.CRITIC_GAN_WEIGHT * critic
                numbers["fake loss"] = loop.update(critic_optimizer, loss)
                continue
            guided = loop.guided(told)

            def fake(x: torch.Tensor, t: torch.Tensor, told: Conditioning = told) -> torch.Tensor:
                with roles.role(FAKE):
                    return loop.original(roles.predict(x, t, told), x, t)

            def real(x: torch.Tensor, t: torch.Tensor, guided: Callable = guided) -> torch.Tensor:
                return loop.original(guided(x, t), x, t)

            matching = dmd2.distribution_matching_loss(
                original, real, fake, timesteps, noise, schedule=schedule
            )
            for parameter in critics:
                parameter.requires_grad_(False)
            gan = dmd2.generator_gan_loss(logits(noisy, timesteps, told))
            numbers["loss"] = loop.update(student_optimizer, matching + dmd2.GENERATOR_GAN_WEIGHT * gan)
            for parameter in critics:
                parameter.requires_grad_(True)
        show(numbers)
    forwards = dmd2.forwards(steps)
    _finish(shared, folder, began, updates=updates, learning_rate=learning_rate, forwards=forwards)


def _finish(
    shared: Shared, folder: Path, began: float, *, updates: int, learning_rate: float, forwards: float
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(shared.roles, folder)
    record = {
        "updates": updates,
        "learning_rate": learning_rate,
        "unet_forwards": round(updates * forwards * shared.config.training.train_batch_size),
        "training_seconds": round(time.monotonic() - began, 1),
    }
    write_json(folder / "peer.json", record)
