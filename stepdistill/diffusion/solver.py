"""Moves along the probability flow by explicit (timestep, prev_timestep) pairs.

move(x_t, x_0, e, t -> s) = alpha_s x_0 + sigma_s e   (Eq 5: DDIM with eta 0, Euler in sigma space)
guidance:  e = e_u + w (e_c - e_u)                    (Ho and Salimans 2022; w = 1 is none)
"""

from collections.abc import Callable

import torch

from stepdistill.diffusion.prediction import to_original_and_noise
from stepdistill.diffusion.schedule import NoiseSchedule

# rows (n,) of the batch, sample (n, ...) and timesteps (n,) -> model output (n, ...)
Predictor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def guide(noise_uncond: torch.Tensor, noise_cond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance on predictions of one kind, (B, ...)."""
    return noise_uncond + guidance_scale * (noise_cond - noise_uncond)


def move(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
) -> torch.Tensor:
    """prev_sample (B, ...) at prev_timesteps (B,) (Eq 5); a row whose prev_timestep is its timestep stays."""
    original, noise = to_original_and_noise(
        model_output, sample, timesteps, schedule=schedule, prediction_type=prediction_type
    )
    alpha, sigma = schedule.alpha_sigma(prev_timesteps, ndim=sample.ndim, dtype=original.dtype)
    return alpha * original + sigma * noise


def rollout(
    predict: Predictor,
    sample: torch.Tensor,
    path: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
) -> torch.Tensor:
    """sample (B, ...) moved along path (B, K + 1), one model evaluation a sub-step.

    `predict(rows, sample, timesteps)` gives the model's output for some rows (n,) of the batch. Rows whose next node is
    where they are have arrived and are not evaluated any more.
    """
    state = sample.to(torch.promote_types(sample.dtype, torch.float32))
    for column in range(path.shape[1] - 1):
        rows = (path[:, column] != path[:, column + 1]).nonzero().squeeze(1)
        if not len(rows):
            continue
        timesteps, prev_timesteps = path[rows, column], path[rows, column + 1]
        current = state[rows]
        output = predict(rows, current, timesteps)
        moved = move(
            output, current, timesteps, prev_timesteps, schedule=schedule, prediction_type=prediction_type
        )
        state = state.index_copy(0, rows, moved.to(state.dtype))
    return state


def implied_noise(
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    schedule: NoiseSchedule,
) -> torch.Tensor:
    """The epsilon e* with move(sample, e*) = prev_sample: e* = (x_s - (a_s / a_t) x_t) / k_ts, (B, ...)."""
    alpha_t, _ = schedule.alpha_sigma(timesteps, ndim=sample.ndim, dtype=sample.dtype)
    alpha_s, _ = schedule.alpha_sigma(prev_timesteps, ndim=sample.ndim, dtype=sample.dtype)
    gain = move_gain(timesteps, prev_timesteps, schedule=schedule, ndim=sample.ndim, dtype=sample.dtype)
    return (prev_sample - alpha_s / alpha_t * sample) / gain


def move_gain(
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    schedule: NoiseSchedule,
    ndim: int = 1,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """k_ts = sigma_s - alpha_s sigma_t / alpha_t, how much an error in epsilon weighs in x_s; (B, 1, ..)."""
    alpha_t, sigma_t = schedule.alpha_sigma(timesteps, ndim=ndim)
    alpha_s, sigma_s = schedule.alpha_sigma(prev_timesteps, ndim=ndim)
    return (sigma_s - alpha_s * sigma_t / alpha_t).to(dtype)
