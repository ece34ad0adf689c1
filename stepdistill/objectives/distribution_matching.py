"""Distribution matching with a fake score (DMD2: Yin et al. 2024, arXiv 2405.14867; DMD: arXiv 2311.18828).

    x      the student's x_0;  x_tau: x noised with epsilon to a random timestep tau
    g      (x_fake(x_tau) - x_real(x_tau)) / mean |x - x_real(x_tau)|        (DMD, Eq 7-8, with x_0 in place of scores)
    L_G    1/2 mean (x - sg(x - g))^2, whose gradient with respect to x is g / number of elements
    L_fake mean (epsilon_fake(x_tau) - epsilon)^2                             (DMD, Eq 6)

x_real is the prediction of the base model with guidance: the score of its images. x_fake is that of a copy which learns the
student's images by L_fake. Where the two differ, the student's images are more, or less, likely than the base's.
"""

import torch

from stepdistill.diffusion.noise_path import NoisePath
from stepdistill.diffusion.prediction import convert_prediction

SCORE_RANGE = (0.02, 0.98)
"""The timesteps tau as fractions of T, first and end: 20 to 979 of 1000, as in DMD."""
_LEAST_ERROR = 1e-6


def draw_score_timesteps(uniform: torch.Tensor, *, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The timesteps tau (B,) at which the two scores are compared, from uniform (B,) in [0, 1)."""
    first, end = (round(share * num_train_timesteps) for share in SCORE_RANGE)
    return (first + uniform.double() * (end - first)).long().clamp(max=end - 1)


def matching_loss(
    original: torch.Tensor, real_original: torch.Tensor, fake_original: torch.Tensor
) -> torch.Tensor:
    """L_G, a scalar, of the student's x_0 and the x_0 that base and fake score predict from it noised, each (B, ...).

    Gradients reach `original` alone. Its value is half the mean square of g, and says little about progress.
    """
    with torch.no_grad():
        error = (original - real_original).abs().flatten(1).mean(dim=1).clamp(min=_LEAST_ERROR)
        direction = (fake_original - real_original) / error.view((-1,) + (1,) * (original.ndim - 1))
        target = original - direction
    return 0.5 * (original - target).square().mean()


def fake_score_loss(
    output: torch.Tensor,
    noisy: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> torch.Tensor:
    """L_fake, a scalar, of the fake score's output, of type prediction_type, at x_tau = `noisy`, each (B, ...)."""
    epsilon = convert_prediction(
        output,
        noisy,
        timesteps,
        noise_path=noise_path,
        prediction_type=prediction_type,
        target="epsilon",
    )
    return (epsilon - noise).square().mean()
