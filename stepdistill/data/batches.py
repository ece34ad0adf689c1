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
from stepdistill.objectives.distribution_matching import draw_score_timesteps


@dataclass(frozen=True)
class Perturbation:
    """How a critic sees the samples of a batch: a discriminator D, or the scores of distribution matching.

    timesteps  (B,), at which it sees each sample. D: t* if prev_timestep is CLEAN, else prev_timestep; the scores: tau
    noise      (B, C, H, W), re-noises the rows that D sees at t*, and all rows for the scores
    """

    timesteps: torch.Tensor
    noise: torch.Tensor

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Perturbation":
        """The same with both tensors changed."""
        return Perturbation(change(self.timesteps), change(self.noise))


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    original_samples, noise    (B, C, H, W), float32
    timesteps, prev_timesteps  (B,), start and end of the student's step
    conditioning               B rows
    teacher_moves              the teacher's steps from timesteps to prev_timesteps; None if there is no teacher rollout
    perturbation               how D sees the samples; None outside adversarial phases
    score                      how the scores see the student's x_0; None without distribution matching
    own_moves                  the student's steps from pure noise to timesteps; None if the student starts at noised data
    """

    original_samples: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prev_timesteps: torch.Tensor
    conditioning: Conditioning
    teacher_moves: Sequence[Move] | None = None
    perturbation: Perturbation | None = None
    score: Perturbation | None = None
    own_moves: Sequence[Move] | None = None

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which `to` copies to a GPU without waiting for it."""
        return self._changed(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """A copy on another device. From a pinned batch, the copies are queued behind the GPU's work and not waited for."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed."""

        def all_changed(moves: Sequence[Move] | None) -> list[Move] | None:
            return None if moves is None else [move.changed(change) for move in moves]

        return Batch(
            original_samples=change(self.original_samples),
            noise=change(self.noise),
            timesteps=change(self.timesteps),
            prev_timesteps=change(self.prev_timesteps),
            conditioning=self.conditioning.changed(change),
            teacher_moves=all_changed(self.teacher_moves),
            perturbation=None if self.perturbation is None else self.perturbation.changed(change),
            score=None if self.score is None else self.score.changed(change),
            own_moves=all_changed(self.own_moves),
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
    for_scores: bool = False,
    from_own: bool = False,
    prompt_dropout: float = 0.0,
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
        for_scores: draw noise and timesteps for the scores of distribution matching.
        prompt_dropout: share of the samples that get the embedding of no prompt in place of their own.
        from_own: begin with the student's own moves from pure noise; node_steps must be student_steps.
        seed: the run's seed.
        keys: names the random stream, together with the seed.
        dtype: dtype of the conditioning; latents and noise are float32.
        group: number of samples in an update, all of one image size; default: `indices` are one whole update.
    """
    samples = cache.draw(indices, seed=rng.derive_seed(seed, *keys), group=group or len(indices))
    random = _Randomness(indices, seed, keys, tuple(samples.latents.shape[1:]))
    picks = random.uniform("timestep")
    nodes = noise_path.nodes(node_steps)[(picks * node_steps).long().clamp(max=node_steps - 1)].tolist()
    ends = noise_path.jump(nodes, student_steps)
    conditioning = samples.conditioning
    if prompt_dropout:
        dropped = random.uniform("prompt_dropout") < prompt_dropout
        conditioning = conditioning.without_prompts(dropped, cache.unconditional)
    count, weights = noise_path.num_train_timesteps, perturbation_weights
    return Batch(
        original_samples=samples.latents,
        noise=random.normal("noise"),
        timesteps=torch.tensor(nodes),
        prev_timesteps=torch.tensor(ends),
        conditioning=conditioning.to("cpu", dtype),
        teacher_moves=None if teacher_steps is None else noise_path.substeps(nodes, ends, teacher_steps),
        perturbation=None if weights is None else random.perturbation(ends, weights, noise_path),
        score=random.score(count) if for_scores else None,
        own_moves=_arrivals(noise_path, nodes, student_steps) if from_own else None,
    )


@dataclass(frozen=True)
class _Randomness:
    """The random numbers of a batch, each kind by its name: a function of the samples' numbers, the seed and the keys.

    shape: of one latent.
    """

    indices: list[int]
    seed: int
    keys: tuple[rng.Key, ...]
    shape: tuple[int, ...]

    def uniform(self, name: str) -> torch.Tensor:
        return rng.uniform(self.indices, seed=self.seed, keys=(*self.keys, name))

    def normal(self, name: str) -> torch.Tensor:
        return rng.normal(self.shape, self.indices, seed=self.seed, keys=(*self.keys, name))

    def perturbation(
        self, ends: Sequence[int], weights: Sequence[float], noise_path: NoisePath
    ) -> Perturbation:
        """How D sees samples that end at these timesteps."""
        uniform = self.uniform("perturbation")
        seen_at = draw_perturbation(torch.tensor(ends), uniform, weights=weights, noise_path=noise_path)
        return Perturbation(seen_at, self.normal("perturbation_noise"))

    def score(self, count: int) -> Perturbation:
        """How the scores see samples; count: T."""
        timesteps = draw_score_timesteps(self.uniform("score_timestep"), num_train_timesteps=count)
        return Perturbation(timesteps, self.normal("score_noise"))


def _arrivals(noise_path: NoisePath, nodes: Sequence[int], steps: int) -> list[Move]:
    """The moves by which an N-step sampler comes from pure noise to the node of each row; none for a row at the first."""
    later = [row for row, node in enumerate(nodes) if node != noise_path.last_timestep]
    if not later:
        return []
    moves = noise_path.substeps([noise_path.last_timestep] * len(later), [nodes[row] for row in later], steps)
    rows = torch.tensor(later)
    return [Move(rows if m.rows is None else rows[m.rows], m.timesteps, m.prev_timesteps) for m in moves]
