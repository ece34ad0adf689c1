"""Adversarial losses on logits of the discriminator D, and the perturbation, so that D never sees clean samples.

non_saturating (Eq 18-21)   L_D = softplus(-D(real_sample)) + softplus(D(student_sample))
                            L_G = softplus(-D(student_sample))
relativistic                L_D = softplus(D(student_sample) - D(real_sample)),   L_G with the signs swapped:
                            both samples of a pair share x_t, prompt and noise, so D has to see only their difference
                            (Jolicoeur-Martineau 2018, arXiv 1807.00734)
perturbation (Eq 25-26)     if the student's step ends at the clean sample, both samples are re-noised to the same t* in
                            {10, 250, 500, 750} of 1000, or on a flow to sigma in {.01, .25, .5, .75}, with the same noise
real_sample                 the teacher's, or the data noised to the same timestep (discriminator.real)
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import softplus

from stepdistill.diffusion.noise_path import CLEAN, NoisePath

PERTURBATION_LEVELS = (0.01, 0.25, 0.5, 0.75)
"""The noise levels t* (noise_path.timestep_at): the paper's times 10, 250, 500 and 750 of 1000; on a flow sigma."""

ADVERSARIAL_LOSSES = ("non_saturating", "relativistic")


def discriminator_loss(
    real_logits: torch.Tensor, student_logits: torch.Tensor, *, kind: str = "non_saturating"
) -> torch.Tensor:
    """L_D of logits (B, heads), averaged over heads and batch: a scalar. ValueError for an unknown kind."""
    if kind == "relativistic":
        return softplus(student_logits - real_logits).mean()
    _check(kind)
    return softplus(-real_logits).mean() + softplus(student_logits).mean()


def generator_loss(
    student_logits: torch.Tensor, real_logits: torch.Tensor, *, kind: str = "non_saturating"
) -> torch.Tensor:
    """L_G of logits (B, heads), averaged over heads and batch: a scalar. Only "relativistic" uses real_logits."""
    if kind == "relativistic":
        return softplus(real_logits - student_logits).mean()
    _check(kind)
    return softplus(-student_logits).mean()


def accuracy(
    real_logits: torch.Tensor, student_logits: torch.Tensor, *, kind: str = "non_saturating"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fractions of real and of student samples that D classifies correctly, by the mean over heads; .5 is chance.

    Correct means a logit above 0 for a real sample, below 0 for a student sample. A single relativistic logit means
    nothing: then both values are the fraction of pairs in which the real sample has the larger logit.
    """
    real, student = real_logits.float().mean(dim=1), student_logits.float().mean(dim=1)
    if kind == "relativistic":
        right = (real > student).float().mean()
        return right, right
    return (real > 0).float().mean(), (student < 0).float().mean()


def _check(kind: str) -> None:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"adversarial loss: got {kind!r}; allowed: {', '.join(ADVERSARIAL_LOSSES)}")


def draw_perturbation(
    prev_timesteps: torch.Tensor,
    uniform: torch.Tensor,
    *,
    weights: Sequence[float],
    noise_path: NoisePath,
) -> torch.Tensor:
    """The timesteps (B,) at which D sees the samples: t* where prev_timestep is CLEAN, else prev_timestep.

    uniform (B,) in [0, 1) picks one of PERTURBATION_LEVELS with `weights` (1:1:1:1, later 5:1:1:1) as the odds.
    """
    times = [noise_path.timestep_at(level) for level in PERTURBATION_LEVELS]
    if len(weights) != len(times) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"perturbation_weights: got {list(weights)}; allowed: 4 numbers >= 0, not all 0")
    edges = torch.tensor(list(weights), dtype=torch.float64, device=uniform.device).cumsum(0)
    pick = torch.bucketize(uniform.double() * edges[-1], edges, right=True).clamp(max=len(weights) - 1)
    drawn = torch.tensor(times, device=uniform.device)[pick]
    return torch.where(prev_timesteps == CLEAN, drawn, prev_timesteps)


def perturb(
    sample: torch.Tensor,
    noise: torch.Tensor,
    prev_timesteps: torch.Tensor,
    perturbed_timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
) -> torch.Tensor:
    """x_s (B, ...), re-noised to perturbed_timesteps in rows whose s is CLEAN and unchanged in the others."""
    renoised = noise_path.add_noise(sample, noise, perturbed_timesteps)
    clean = (prev_timesteps == CLEAN).view((-1,) + (1,) * (sample.ndim - 1))
    return torch.where(clean, renoised, sample)
