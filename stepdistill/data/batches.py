"""The samples and the randomness of one update, by index: the same whatever the micro-batch or the processes."""

import concurrent.futures
import itertools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.diffusion.schedule import jump, trailing_timesteps
from stepdistill.models.conditioning import Conditioning


@dataclass(frozen=True)
class Batch:
    """original_samples, noise, perturbation_noise (B, C, H, W); timesteps, prev_timesteps (B,) of the student's move;
    perturbation_uniform (B,) in [0, 1); conditioning of B rows."""

    original_samples: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prev_timesteps: torch.Tensor
    conditioning: Conditioning
    perturbation_uniform: torch.Tensor
    perturbation_noise: torch.Tensor


def ahead(draw: Callable[[int], Batch], firsts: Iterable[int]) -> Generator[tuple[int, Batch]]:
    """(first, draw(first)) one after another, the next one drawn by a thread while the last is worked on."""
    rest = iter(firsts)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = [(first, pool.submit(draw, first)) for first in itertools.islice(rest, 1)]
        while coming:
            first, drawn = coming.pop()
            batch = drawn.result()
            coming = [(later, pool.submit(draw, later)) for later in itertools.islice(rest, 1)]
            yield first, batch


def draw_batch(
    cache: LatentCache,
    indices: list[int],
    *,
    student_steps: int,
    node_steps: int,
    seed: int,
    keys: tuple[rng.Key, ...],
    device: torch.device,
    dtype: torch.dtype,
    group: int | None = None,
    num_train_timesteps: int = 1000,
) -> Batch:
    """The batch of the global sample `indices` of the phase named by `keys`; t is uniform over the node_steps grid.

    dtype is the conditioning's; latents and noise are float32. group: samples of an update, which are all of one size; where
    not given these indices are one.
    """
    samples = cache.draw(indices, seed=rng.derive_seed(seed, *keys), group=group or len(indices))
    nodes = trailing_timesteps(node_steps, num_train_timesteps=num_train_timesteps)
    picks = rng.uniform(indices, seed=seed, keys=(*keys, "timestep"))
    timesteps = nodes[(picks * node_steps).long().clamp(max=node_steps - 1)]
    shape = tuple(samples.latents.shape[1:])
    return Batch(
        original_samples=samples.latents.to(device),
        noise=rng.normal(shape, indices, seed=seed, keys=(*keys, "noise")).to(device),
        timesteps=timesteps.to(device),
        prev_timesteps=jump(timesteps, student_steps, num_train_timesteps=num_train_timesteps).to(device),
        conditioning=samples.conditioning.to(device, dtype),
        perturbation_uniform=rng.uniform(indices, seed=seed, keys=(*keys, "perturbation")).to(device),
        perturbation_noise=rng.normal(shape, indices, seed=seed, keys=(*keys, "perturbation_noise")).to(
            device
        ),
    )
