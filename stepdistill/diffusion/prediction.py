"""Converts a U-Net's output between epsilon, x0 and v, so that all other code just names the target it needs.

x_t = alpha_t x_0 + sigma_t e   (Eq 1)        x_0 = (x_t - sigma_t e) / alpha_t   (Eq 3)
v   = alpha_t e - sigma_t x_0                 e   = (x_t - alpha_t x_0) / sigma_t (Eq 4)
"""

import torch

from stepdistill.diffusion.noise_path import NoisePath

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def convert(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
    target: str,
) -> torch.Tensor:
    """Converts model_output (B, ...) at sample (B, ...) from `prediction_type` to `target`, both of PREDICTION_TYPES.

    As in diffusers, "sample" means x_0. The arithmetic is float32, or float64 if an input is float64. ValueError for an
    unknown name, and if the result is undefined: from epsilon at zero terminal SNR, where alpha_T is 0. On a GPU this last
    check is skipped, because it would wait for the device; checking the config excludes that case (teacher/ladder_fit.py).
    """
    for name in (prediction_type, target):
        if name not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: got {name!r}; allowed: {', '.join(PREDICTION_TYPES)}")
    dtype = torch.promote_types(torch.promote_types(model_output.dtype, sample.dtype), torch.float32)
    output, x_t = model_output.to(dtype), sample.to(dtype)
    if prediction_type == target:
        return output
    alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=x_t.ndim, dtype=dtype)
    if prediction_type == "epsilon" and alpha.device.type == "cpu" and not bool((alpha > 0).all()):
        raise ValueError(
            "epsilon says nothing about x0 at zero terminal SNR (alpha_T = 0); use v_prediction or sample"
        )
    if prediction_type == "epsilon":
        original, noise = (x_t - sigma * output) / alpha, output
    elif prediction_type == "sample":
        original = output
        noise = (x_t - alpha * output) / sigma if target != "sample" else output
    else:
        original, noise = alpha * x_t - sigma * output, sigma * x_t + alpha * output
    if target == "sample":
        return original
    if target == "epsilon":
        return noise
    return alpha * noise - sigma * original


def to_original_and_noise(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted x_0, predicted e), each (B, ...): the two terms of a solver step."""
    original, noise = (
        convert(
            model_output,
            sample,
            timesteps,
            noise_path=noise_path,
            prediction_type=prediction_type,
            target=target,
        )
        for target in ("sample", "epsilon")
    )
    return original, noise
