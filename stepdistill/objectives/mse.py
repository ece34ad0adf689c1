"""Mean squared error between the student's one move and the teacher's many moves from x_t to x_s, in a named space (Eq 16).

alpha_t, sigma_t are those of x_t = alpha_t x_0 + sigma_t e. The losses of convert, output and denoise are here too.

prev_sample   || y_hat - y ||^2 on x_s, the paper's form; it equals k_ts^2 times the epsilon form, where
              k_ts = sigma_s - alpha_s sigma_t / alpha_t, and grows 15,000-fold from the 32-step rung to one step
epsilon       the error expressed in epsilon:  (y_hat - y) / k_ts
sample        the error expressed in x_0:      (y_hat - y) / (alpha_s - sigma_s alpha_t / sigma_t)
v_prediction  the error expressed in v:        the x_0 error / sigma_t
velocity      the error expressed in e - x_0:  (y_hat - y) (alpha_t + sigma_t) / (sigma_s alpha_t - alpha_s sigma_t)
truncated_snr the larger of epsilon and sample: the x_0 error weighted by max(SNR, 1) (Salimans and Ho 2022, 2202.00512)
"""

import torch

from stepdistill.diffusion.noise_path import NoisePath
from stepdistill.diffusion.solver import move_gain

LOSS_SPACES = ("prev_sample", "epsilon", "sample", "v_prediction", "velocity", "truncated_snr")


def space_weight(
    timesteps: torch.Tensor, prev_timesteps: torch.Tensor, *, noise_path: NoisePath, space: str
) -> torch.Tensor:
    """The factors (B,), float64, from a squared error in x_s to one in `space`; ValueError for an unknown space."""
    if space == "prev_sample":
        return torch.ones(len(timesteps), dtype=torch.float64, device=timesteps.device)
    alpha_t, sigma_t = noise_path.alpha_sigma(timesteps)
    noise_gain = move_gain(timesteps, prev_timesteps, noise_path=noise_path)
    if space == "epsilon":
        return noise_gain**-2
    alpha_s, sigma_s = noise_path.alpha_sigma(prev_timesteps)
    original_gain = alpha_s - sigma_s * alpha_t / sigma_t
    if space == "sample":
        return original_gain**-2
    if space == "v_prediction":
        return (original_gain * sigma_t) ** -2
    if space == "velocity":
        return ((alpha_s * sigma_t - sigma_s * alpha_t) / (alpha_t + sigma_t)) ** -2
    if space == "truncated_snr":
        return torch.maximum(noise_gain**-2, original_gain**-2)
    raise ValueError(f"loss_space: got {space!r}; allowed: {', '.join(LOSS_SPACES)}")


def mse_loss(
    student_sample: torch.Tensor,
    teacher_sample: torch.Tensor,
    timesteps: torch.Tensor,
    prev_timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    space: str,
) -> torch.Tensor:
    """Squared error between two x_s (B, ...), weighted as in `space`, averaged over batch and elements: a scalar."""
    weight = space_weight(timesteps, prev_timesteps, noise_path=noise_path, space=space)
    error = (student_sample - teacher_sample).square().flatten(1).mean(dim=1)
    return (error * weight.to(error.dtype)).mean()


def output_loss(student_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """MSE of the student's output (B, ...): to the teacher's, or to what an exact output would be (`denoising_target`)."""
    return (student_output - target).square().mean()


def denoising_target(
    original: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> torch.Tensor:
    """The output (B, ...) that denoises x_t exactly: epsilon, x_0, v = alpha_t epsilon - sigma_t x_0, or the velocity
    epsilon - x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return original
    if prediction_type == "velocity":
        return noise - original
    alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=original.ndim, dtype=original.dtype)
    return alpha * noise - sigma * original


def convert_loss(student_original: torch.Tensor, teacher_original: torch.Tensor) -> torch.Tensor:
    """MSE between two predictions of x_0 (B, ...), for changing the student's prediction type (Eq 27-29).

    Before the 1-step rung the student learns to output another type (in the paper x_0 itself instead of epsilon); its target
    is the frozen copy of the student from before the change.
    """
    return (student_original - teacher_original).square().mean()
