"""DMD2 (Yin et al. 2024, arXiv 2405.14867) with a LoRA for the student and one for the fake score.

student      x0 = G(x_t, t) at the student's N nodes; x_t by backward simulation: a roll-out, re-noised between nodes
fake score   epsilon MSE on noised student samples; five updates for each update of the student
student loss 1/2 || x0 - sg(x0 - g) ||^2,  g = (x0_fake - x0_real) / mean |x0 - x0_real|  at t in [20, 980), real guided
adversary    a head on the fake score's mid-block, on noised real data and student samples; softplus

Loss weights are those published for Stable Diffusion's latents: .001 for the student's adversarial term, .01 for the head's.
Sampling uses LCMScheduler at the same nodes with guidance 1. The one-step student is given timestep 399 with pure noise, as
published for SDXL. As for every method here, only the learning rate is tuned.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import softplus

from stepdistill.diffusion.grid import trailing_nodes
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.objectives.distribution_matching import matching_loss

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
    """Cost of one student update and its five fake-score updates per sample, in forwards of the bare U-Net.

    A LoRA forward counts 1.083 (as in stepdistill/plan.py), its backward 1.268, encoder and mid-block .434 of either.
    """
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
    """x (B, ...) at nodes[stops], reached from pure noise by the generator's steps.

    Args:
        generator: (rows (n,) of the batch, their samples, their timesteps (n,)) -> x_0 (n, ...).
        noises: (N, B, ...): the initial noise, then the noise added at each later node.
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
    """A scalar whose gradient with respect to `original` (B, ...) is g / number of elements (g: see the top of the file)."""
    with torch.no_grad():
        noisy = noise_path.add_noise(original, noise, timesteps)
        real_original, fake_original = real(noisy, timesteps), fake(noisy, timesteps)
    return matching_loss(original, real_original, fake_original)


def critic_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The head's loss from its logits (B, 1) on noised data and on noised student samples."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def generator_gan_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The student's adversarial loss from the head's logits (B, 1) on its noised samples."""
    return softplus(-fake_logits).mean()
