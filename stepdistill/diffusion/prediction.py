"""What a network predicts, as one linear form of x_0 and noise e, so that callers ask for the prediction that they want.

x_t = alpha_t x_0 + sigma_t e   (Eq 1)
o   = a x_0 + b e               the network's output, with a and b by its prediction type (COEFFICIENTS)
x_0 = (b x_t - sigma_t o) / det (Eq 3)      e = (alpha_t o - a x_t) / det (Eq 4)      det = alpha_t b - sigma_t a

det is 0 for epsilon at zero terminal SNR, where alpha_T = 0: the output then says nothing about x_0. Denoiser refuses that.
"""

from collections.abc import Callable

import torch

from stepdistill.diffusion.noise_path import NoisePath

Coefficient = torch.Tensor | int
COEFFICIENTS: dict[
    str, Callable[[torch.Tensor, torch.Tensor], tuple[Coefficient, Coefficient, Coefficient]]
] = {
    "epsilon": lambda alpha, _sigma: (0, 1, alpha),
    "sample": lambda _alpha, sigma: (1, 0, -sigma),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha, 1),
    "velocity": lambda alpha, sigma: (-1, 1, alpha + sigma),
}
"""(a, b, det) by prediction type. det of v_prediction is alpha_t^2 + sigma_t^2, which is 1 on a variance-preserving path;
velocity is e - x_0, what flow-matching models predict, and its det is 1 on a rectified flow. An int coefficient (0 or 1) is
skipped, not multiplied, so that it changes no bit of the result."""
PREDICTION_TYPES = tuple(COEFFICIENTS)


def convert_prediction(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
    target: str,
) -> torch.Tensor:
    """Converts model_output (B, ...) of `prediction_type` at sample (B, ...) to `target`, both of PREDICTION_TYPES.

    "sample" is x_0, in diffusers' words. The arithmetic is float32, or float64 if an input is. ValueError for an unknown
    name.
    """
    _check_names(prediction_type, target)
    output, x_t = _in_one_dtype(model_output, sample)
    if prediction_type == target:
        return output
    alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=x_t.ndim, dtype=x_t.dtype)
    a, b, _ = COEFFICIENTS[target](alpha, sigma)
    original = None if _is(a, 0) else _original(output, x_t, alpha, sigma, prediction_type)
    noise = None if _is(b, 0) else _noise(output, x_t, alpha, sigma, prediction_type)
    terms = [_times(factor, part) for factor, part in ((b, noise), (a, original)) if part is not None]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def to_original_and_noise(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    noise_path: NoisePath,
    prediction_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted x_0 and e, each (B, ...), that a solver moves with; as `convert` gives them."""
    _check_names(prediction_type)
    output, x_t = _in_one_dtype(model_output, sample)
    alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=x_t.ndim, dtype=x_t.dtype)
    original = _original(output, x_t, alpha, sigma, prediction_type)
    return original, _noise(output, x_t, alpha, sigma, prediction_type)


def _original(
    output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """x_0 = (b x_t - sigma_t o) / det; the output itself if it is x_0."""
    _, b, det = COEFFICIENTS[prediction_type](alpha, sigma)
    if _is(b, 0):
        return output
    return _over(_times(b, x_t) - sigma * output, det)


def _noise(
    output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """e = (alpha_t o - a x_t) / det; the output itself if it is e."""
    a, _, det = COEFFICIENTS[prediction_type](alpha, sigma)
    if _is(a, 0):
        return output
    return _over(alpha * output - _times(a, x_t), det)


def _is(coefficient: Coefficient, number: int) -> bool:
    """Whether a coefficient is this int. True only for an int; tensors are not compared."""
    return isinstance(coefficient, int) and coefficient == number


def _times(factor: Coefficient, value: torch.Tensor) -> torch.Tensor:
    return value if _is(factor, 1) else factor * value


def _over(value: torch.Tensor, divisor: Coefficient) -> torch.Tensor:
    return value if _is(divisor, 1) else value / divisor


def _in_one_dtype(output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(output.dtype, sample.dtype), torch.float32)
    return output.to(dtype), sample.to(dtype)


def _check_names(*names: str) -> None:
    for name in names:
        if name not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: got {name!r}; allowed: {', '.join(PREDICTION_TYPES)}")
