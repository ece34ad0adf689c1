"""DMD2 (Yin et al. 2024, arXiv 2405.14867) with a LoRA for the student and one for the fake score.

student x0 = G(x_t, t) at its own N nodes; x_t by backward simulation: its own roll-out, re-noised between nodes
fake score   epsilon MSE on noised student samples, five updates to each of the student's
student      1/2 || x0 - sg(x0 - g) ||^2,  g = (x0_fake - x0_real) / mean |x0 - x0_real|  at t in [20, 980), real guided
adversary    a head on the fake score's mid-block, on noised real data and student samples; softplus

Weights as published for Stable Diffusion's latents: student's adversarial term .001, head's .01. Sampled with LCMScheduler
at the same nodes, guidance 1; the one-step student is told 399 with pure noise, as SDXL's. What is tuned here, as for every
method, is the learning rate.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import softplus

from stepdistill.diffusion.grid import trailing_nodes
from stepdistill.diffusion.noise_path import VariancePreserving
from stepdistill.diffusion.prediction import convert

FAKE_UPDATES = 5
GENERATOR_GAN_WEIGHT = 1e-3
CRITIC_GAN_WEIGHT = 1e-2
SCORE_RANGE = (20, 980)
ONE_STEP_NODE = 399

# sample (B, ...), timesteps (B,) -> x_0 (B, ...)
Original = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def nodes(steps: int) -> torch.Tensor:
    """The student's timesteps (N,), noisiest first."""
    return torch.tensor([ONE_STEP_NODE] if steps == 1 else trailing_nodes(steps))


def forwards(steps: int) -> float:
    """Forwards of the bare U-Net per sample and student update, with the five updates of the fake score; in the units of
    the recipe's section 5: a LoRA forward is 1.083, its backward 1.268, encoder and mid-block .434 of either."""
    forward, backward, encoder = 1.083, 1.268, 0.434
    simulation = forward * (steps - 1) / 2
    fake = simulation + forward + (forward + backward) * (1 + 2 * encoder)
    student = simulation + (forward + backward) * (1 + encoder) + 2 + forward
    return FAKE_UPDATES * fake + student


@torch.no_grad()
def backward_simulation(
    generator: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noises: torch.Tensor,
    nodes: torch.Tensor,
    stops: torch.Tensor,
    *,
    noise_path: VariancePreserving,
) -> torch.Tensor:
    """x (B, ...) at nodes[stops], by the generator's own steps from noise.

    Args:
        generator: rows (n,) of the batch, sample and timesteps (n,) of these -> x_0 (n, ...).
        noises: (N, B, ...): what the roll-out begins with, then the noise of each later node.
        nodes: timesteps (N,) of the N-step sampler, noisiest first.
        stops: (B,) in 0 .. N - 1.
    """
    sample = noises[0]
    for k in range(1, len(nodes)):
        rows = (stops >= k).nonzero().squeeze(1)
        if not len(rows):
            break
        original = generator(rows, sample[rows], nodes[k - 1].expand(len(rows)))
        renoised = noise_path.add_noise(original, noises[k][rows], nodes[k].expand(len(rows)))
        sample = sample.index_copy(0, rows, renoised)
    return sample


def distribution_matching_loss(
    original: torch.Tensor,
    real: Original,
    fake: Original,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    *,
    noise_path: VariancePreserving,
) -> torch.Tensor:
    """The scalar whose gradient with respect to `original` (B, ...) is g / number of elements."""
    with torch.no_grad():
        noisy = noise_path.add_noise(original, noise, timesteps)
        real_original, fake_original = real(noisy, timesteps), fake(noisy, timesteps)
        scale = (original - real_original).abs().flatten(1).mean(dim=1)
        direction = (fake_original - real_original) / scale.clamp(min=1e-6).view(
            (-1,) + (1,) * (original.ndim - 1)
        )
        target = original - direction
    return 0.5 * (original - target).square().mean()


def fake_score_loss(
    output: torch.Tensor,
    noisy: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: VariancePreserving,
    prediction_type: str,
) -> torch.Tensor:
    """MSE of the fake score's epsilon (B, ...) against the noise in it, a scalar."""
    epsilon = convert(
        output,
        noisy,
        timesteps,
        noise_path=noise_path,
        prediction_type=prediction_type,
        target="epsilon",
    )
    return (epsilon - noise).square().mean()


def critic_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Of the head, on logits (B, 1) of noised data and of noised student samples."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def generator_gan_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Of the student, on logits (B, 1) of its noised samples."""
    return softplus(-fake_logits).mean()
