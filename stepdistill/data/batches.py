"""The samples and the randomness of one update, a function of the sample's number alone.

Sample n has the same noise and timestep in any micro-batch of any process. An update takes `group` samples: micro-batch size
times micro-batches times processes. Any split of the same group gives the same updates.

Everything that depends on timesteps alone is computed here, on the CPU and before the update, and copied from page-locked
memory, so that the update does not wait for the GPU.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import torch

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.diffusion.noise_path import Move, NoisePath
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.objectives.adversarial import draw_perturbation


@dataclass(frozen=True)
class Perturbation:
    """How the discriminator D sees the samples of a batch.

    timesteps  (B,), at which D sees each sample: t* if prev_timestep is CLEAN, else prev_timestep
    noise      (B, C, H, W), re-noises the rows whose prev_timestep is CLEAN
    """

    timesteps: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    original_samples, noise    (B, C, H, W), float32
    timesteps, prev_timesteps  (B,), start and end of the student's step
    conditioning               B rows
    teacher_moves              the teacher's steps from timesteps to prev_timesteps; None if there is no teacher rollout
    perturbation               None outside adversarial phases
    """

    original_samples: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prev_timesteps: torch.Tensor
    conditioning: Conditioning
    teacher_moves: Sequence[Move] | None = None
    perturbation: Perturbation | None = None

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which `to` copies to a GPU without waiting for it."""
        return self._changed(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """A copy on another device. From a pinned batch, the copies are queued behind the GPU's work and not waited for."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        moves, seen = self.teacher_moves, self.perturbation
        return Batch(
            original_samples=change(self.original_samples),
            noise=change(self.noise),
            timesteps=change(self.timesteps),
            prev_timesteps=change(self.prev_timesteps),
            conditioning=self.conditioning.changed(change),
            teacher_moves=None if moves is None else [move.changed(change) for move in moves],
            perturbation=None if seen is None else Perturbation(change(seen.timesteps), change(seen.noise)),
        )


def ahead(draw: Callable[[int], Batch], firsts: Iterable[int]) -> Generator[tuple[int, Batch]]:
    """Yields (first, draw(first)) for each of `firsts` in order; a thread draws the next batch in the meantime."""
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
    noise_path: NoisePath,
    student_steps: int,
    node_steps: int,
    teacher_steps: int | None = None,
    perturbation_weights: Sequence[float] | None = None,
    seed: int,
    keys: tuple[rng.Key, ...],
    dtype: torch.dtype,
    group: int | None = None,
) -> Batch:
    """The batch of the global sample `indices` of the phase named by `keys`, on the CPU; timesteps are uniform over the
    node_steps grid.

    Args:
        cache: latents and text embeddings.
        indices: sample numbers, counted from the start of the phase.
        noise_path: of the base model.
        student_steps: steps of the student's sampler; each sample moves to the next node of its grid.
        node_steps: steps of the sampler whose nodes the timesteps are drawn from.
        teacher_steps: steps of the teacher's sampler; default: teacher_moves is None.
        perturbation_weights: weights of the timesteps t* (objectives/adversarial.py); default: perturbation is None.
        seed: the run's seed.
        keys: names the random stream, together with the seed.
        dtype: dtype of the conditioning; latents and noise are float32.
        group: number of samples in an update, all of one image size; default: `indices` are one whole update.
    """
    samples = cache.draw(indices, seed=rng.derive_seed(seed, *keys), group=group or len(indices))
    picks = rng.uniform(indices, seed=seed, keys=(*keys, "timestep"))
    nodes = noise_path.nodes(node_steps)[(picks * node_steps).long().clamp(max=node_steps - 1)].tolist()
    ends = noise_path.jump(nodes, student_steps)
    shape = tuple(samples.latents.shape[1:])
    perturbation = None
    if perturbation_weights is not None:
        seen_at = draw_perturbation(
            torch.tensor(ends),
            rng.uniform(indices, seed=seed, keys=(*keys, "perturbation")),
            weights=perturbation_weights,
            num_train_timesteps=noise_path.num_train_timesteps,
        )
        noise = rng.normal(shape, indices, seed=seed, keys=(*keys, "perturbation_noise"))
        perturbation = Perturbation(seen_at, noise)
    moves = None if teacher_steps is None else noise_path.substeps(nodes, ends, teacher_steps)
    return Batch(
        original_samples=samples.latents,
        noise=rng.normal(shape, indices, seed=seed, keys=(*keys, "noise")),
        timesteps=torch.tensor(nodes),
        prev_timesteps=torch.tensor(ends),
        conditioning=samples.conditioning.to("cpu", dtype),
        teacher_moves=moves,
        perturbation=perturbation,
    )
