"""LCM-LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556): skip-step consistency on a 50-node grid.

f(x, t)   = c_skip(t) x + c_out(t) x0(x, t)      c_skip = sd^2 / (tau^2 + sd^2), c_out = tau / sqrt(tau^2 + sd^2)
x_s       = one DDIM step t -> s = t - 20 of the guided teacher;  at the last node s is 0
loss      = huber(f(x_t, t; student), f(x_s, s; the same weights, no gradient)), sqrt(d^2 + c^2) - c

The settings are those of the published trainer: 50 nodes, tau = 10 t, sd = .5, Huber c = .001, LoRA, guidance only in the
teacher's step. Sampling uses diffusers' LCMScheduler with guidance 1. As for every method here, only the learning rate is
tuned.
"""

from collections.abc import Callable

import torch

from stepdistill.diffusion.prediction import convert_prediction, to_original_and_noise
from stepdistill.diffusion.variance_preserving import VariancePreserving

NODES = 50
HUBER_C = 0.001
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
# Forwards of the bare U-Net per sample and update: guided teacher 2, target 1.083, student 1.083 + 1.268.
FORWARDS = 2 + 1.083 + 1.083 + 1.268

# sample (B, ...), timesteps (B,) -> model output (B, ...)
Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def boundary_scalings(timesteps: torch.Tensor, *, ndim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out at timesteps (B,), each (B, 1, ..) with `ndim` dimensions. They make f(x, 0) = x."""
    tau = timesteps.double() * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (tau**2 + SIGMA_DATA**2)
    out = tau / (tau**2 + SIGMA_DATA**2).sqrt()
    shape = (-1,) + (1,) * (ndim - 1)
    return skip.view(shape), out.view(shape)


def consistency_loss(
    student: Model,
    target: Model,
    teacher: Model,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: VariancePreserving,
    prediction_type: str,
) -> torch.Tensor:
    """The consistency loss at x_t (B, ...) and timesteps (B,) of the 50-node grid, a scalar. `teacher` includes guidance."""
    prev_timesteps = (timesteps - noise_path.num_train_timesteps // NODES).clamp(min=0)
    with torch.no_grad():
        original, noise = to_original_and_noise(
            teacher(sample, timesteps),
            sample,
            timesteps,
            noise_path=noise_path,
            prediction_type=prediction_type,
        )
        alpha, sigma = noise_path.alpha_sigma(prev_timesteps, ndim=sample.ndim, dtype=sample.dtype)
        prev_sample = alpha * original + sigma * noise
        target_prediction = consistency(target, prev_sample, prev_timesteps, noise_path, prediction_type)
    prediction = consistency(student, sample, timesteps, noise_path, prediction_type)
    return (((prediction - target_prediction) ** 2 + HUBER_C**2).sqrt() - HUBER_C).mean()


def consistency(
    model: Model,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    noise_path: VariancePreserving,
    prediction_type: str,
) -> torch.Tensor:
    """The consistency function f(x_t, t), (B, ...)."""
    original = convert_prediction(
        model(sample, timesteps),
        sample,
        timesteps,
        noise_path=noise_path,
        prediction_type=prediction_type,
        target="sample",
    )
    skip, out = boundary_scalings(timesteps, ndim=sample.ndim)
    return skip.to(sample.dtype) * sample + out.to(sample.dtype) * original
