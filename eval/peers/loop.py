"""What the training loops of the peers share: batches and noise by index, clipped updates, student, and saving the LoRA."""

import math
import time
from pathlib import Path

import torch

from stepdistill import rng
from stepdistill.config import RunConfig
from stepdistill.data.batches import Batch, draw_batch
from stepdistill.disk.durable import read_json, write_json
from stepdistill.errors import NonFiniteError
from stepdistill.ladder import load_shared, save_lora
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.shared_network import STUDENT
from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.run.log import PhaseProgress
from stepdistill.runtime import Runtime
from stepdistill.training.optim import RoleOptimizer

TIMESTEPS = 1000


def is_finished(folder: Path, **expected: object) -> bool:
    """Whether `folder` has a finished LoRA that was trained with the `expected` updates, learning_rate and start."""
    record = read_json(folder / "peer.json")
    return isinstance(record, dict) and all(record.get(key) == value for key, value in expected.items())


class Loop:
    """Network, data, randomness and updates for the training of one peer.

    Args:
        config: the run; its cache must be prepared.
        keys: the random keys of this training.
        nodes: number of nodes of the timestep grid that batches are drawn from.
    Raises ValueError if the teacher does not have 1,000 timesteps.
    """

    def __init__(self, config: RunConfig, keys: tuple[rng.Key, ...], nodes: int) -> None:
        self._began = time.monotonic()
        self.shared = load_shared(config, Runtime(mixed_precision=config.training.mixed_precision))
        count = self.shared.noise_path.num_train_timesteps
        if count != TIMESTEPS:
            raise ValueError(
                f"teacher.path: got a teacher of {count} timesteps; allowed: {TIMESTEPS}, because the published "
                f"settings of the other methods assume that"
            )
        self._config, self._keys, self._nodes = config, keys, nodes

    def batch(self, number: int) -> Batch:
        """The batch of update number `number`."""
        return draw_batch(
            self.shared.cache,
            self._indices(number),
            noise_path=self.shared.noise_path,
            student_steps=self._nodes,
            node_steps=self._nodes,
            seed=self._config.seed,
            keys=self._keys,
            dtype=self.shared.runtime.weight_dtype,
        ).to(self.shared.runtime.device)

    def uniform(self, number: int, name: str) -> torch.Tensor:
        """Uniform random numbers (B,) in [0, 1) for an update; `name` distinguishes its draws."""
        drawn = rng.uniform(self._indices(number), seed=self._config.seed, keys=(*self._keys, name))
        return drawn.to(self.shared.runtime.device)

    def normal(self, number: int, name: str) -> torch.Tensor:
        """Normal random numbers (B, C, H, W) for an update; `name` distinguishes its draws."""
        shape, keys = next(iter(self.shared.cache.latent_shapes.values())), (*self._keys, name)
        drawn = rng.normal(shape, self._indices(number), seed=self._config.seed, keys=keys)
        return drawn.to(self.shared.runtime.device)

    def optimizer(self, weights: TrainedWeights, learning_rate: float, updates: int) -> RoleOptimizer:
        """The optimiser of all methods here: Adam with the config's warm-up and decay."""
        return RoleOptimizer(
            weights,
            learning_rate=learning_rate,
            adversarial=False,
            max_train_steps=updates,
            lr_warmup_steps=self._config.training.lr_warmup_steps,
            lr_final_fraction=self._config.training.lr_final_fraction,
        )

    def update(self, optimizer: RoleOptimizer, loss: torch.Tensor) -> float:
        """One clipped update; returns the loss. NonFiniteError, without an update, if loss or gradient is not finite."""
        optimizer.zero_grad()
        loss.backward()
        norm = float(optimizer.clip(self._config.training.max_grad_norm))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {loss.item()}, gradient norm {norm}; nothing was updated")
        optimizer.step()
        return loss.item()

    def progress(self, title: str, updates: int) -> PhaseProgress:
        """A progress bar, or plain lines if there is no terminal."""
        return PhaseProgress(title, updates, logging_steps=self._config.training.logging_steps, enabled=True)

    @property
    def student(self) -> Denoiser:
        """The base model with the adapter that trains; its prediction type is that of the base."""
        base = self.shared.undistilled
        return Denoiser(base.network, STUDENT, base.noise_path, base.prediction_type, trains=True)

    def finish(
        self, folder: Path, *, updates: int, learning_rate: float, start: str | None, forwards: float
    ) -> None:
        """Writes the LoRA and peer.json, which records settings and cost.

        start: hash of the weights that training started from, or None for the base.
        forwards: U-Net forwards per sample and update.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_lora(self.shared.network, folder)
        record = {
            "updates": updates,
            "learning_rate": learning_rate,
            "start": start,
            "unet_forwards": round(updates * forwards * self._config.training.train_batch_size),
            "training_seconds": round(time.monotonic() - self._began, 1),
        }
        write_json(folder / "peer.json", record)

    def _indices(self, number: int) -> list[int]:
        size = self._config.training.train_batch_size
        return list(range(number * size, (number + 1) * size))
