"""Solver steps along the probability flow, given by explicit (timestep, prev_timestep) pairs.

move(x_t, x_0, e, t -> s) = alpha_s x_0 + sigma_s e   (Eq 5: DDIM with eta 0, Euler in sigma space)
guidance:  e = e_u + w (e_c - e_u)                    (Ho and Salimans 2022; w = 1: no guidance)
"""

from collections.abc import Callable, Sequence

import torch

from stepdistill.diffusion.noise_path import Move, NoisePath
from stepdistill.diffusion.prediction import to_original_and_noise

# (rows (n,) of the batch or None for all, sample (n, ...), timesteps (n,)) -> model output (n, ...)
Predictor = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]


def guide(noise_uncond: torch.Tensor, noise_cond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance from two predictions (B, ...) of the same type."""
    return noise_uncond + guidance_scale * (noise_cond - noise_uncond)


def move(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> torch.Tensor:
    """One step to prev_sample (B, ...) at prev_timesteps (B,) (Eq 5); a row stays if both its timesteps are equal."""
    original, noise = to_original_and_noise(
        model_output, sample, timesteps, noise_path=noise_path, prediction_type=prediction_type
    )
    alpha, sigma = noise_path.alpha_sigma(prev_timesteps, ndim=sample.ndim, dtype=original.dtype)
    return alpha * original + sigma * noise


def rollout(
    predict: Predictor,
    sample: torch.Tensor,
    moves: Sequence[Move],
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> torch.Tensor:
    """Moves sample (B, ...) along `moves`, with one model evaluation per move.

    `predict(rows, sample, timesteps)` returns the model's output for the rows (n,) of the batch that take the move. Rows
    that have arrived are no longer evaluated.
    """
    state = sample.to(torch.promote_types(sample.dtype, torch.float32))
    for step in moves:
        current = state if step.rows is None else state[step.rows]
        moved = move(
            predict(step.rows, current, step.timesteps),
            current,
            step.timesteps,
            step.prev_timesteps,
            noise_path=noise_path,
            prediction_type=prediction_type,
        ).to(state.dtype)
        state = moved if step.rows is None else state.index_copy(0, step.rows, moved)
    return state


def implied_noise(
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
) -> torch.Tensor:
    """The epsilon e* for which move(sample, e*) = prev_sample: e* = (x_s - (a_s / a_t) x_t) / k_ts, (B, ...)."""
    alpha_t, _ = noise_path.alpha_sigma(timesteps, ndim=sample.ndim, dtype=sample.dtype)
    alpha_s, _ = noise_path.alpha_sigma(prev_timesteps, ndim=sample.ndim, dtype=sample.dtype)
    gain = move_gain(timesteps, prev_timesteps, noise_path=noise_path, ndim=sample.ndim, dtype=sample.dtype)
    return (prev_sample - alpha_s / alpha_t * sample) / gain


def move_gain(
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    ndim: int = 1,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """k_ts = sigma_s - alpha_s sigma_t / alpha_t, (B, 1, ..): the factor from an error in epsilon to the error in x_s."""
    alpha_t, sigma_t = noise_path.alpha_sigma(timesteps, ndim=ndim)
    alpha_s, sigma_s = noise_path.alpha_sigma(prev_timesteps, ndim=ndim)
    return (sigma_s - alpha_s * sigma_t / alpha_t).to(dtype)
