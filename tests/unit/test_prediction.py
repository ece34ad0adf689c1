"""Conversions between epsilon, v and x0, moves, and guidance."""

import itertools

import pytest
import torch

from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.prediction import (
    COEFFICIENTS,
    PREDICTION_TYPES,
    convert_prediction,
    to_original_and_noise,
)
from stepdistill.diffusion.solver import guide, implied_noise, move
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.models.denoiser import Denoiser
from tests.conftest import randn

TIMESTEPS = torch.tensor([999, 749, 250, 10])


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PREDICTION_TYPES, 2)))
def test_round_trips_in_float64(noise_path, first, second):
    x_t, output = randn(4, 4, 8, 8, dtype=torch.float64), randn(4, 4, 8, 8, seed=1, dtype=torch.float64)
    converted = convert_prediction(
        output, x_t, TIMESTEPS, noise_path=noise_path, prediction_type=first, target=second
    )
    back = convert_prediction(
        converted, x_t, TIMESTEPS, noise_path=noise_path, prediction_type=second, target=first
    )
    assert torch.allclose(back, output, atol=1e-11)


def test_all_prediction_types_agree_on_a_noised_sample(noise_path):
    """x_t = a x0 + s e, v = a e - s x0, velocity e - x0: each conversion gives back what x_t was made of."""
    original, noise = (randn(4, 4, 8, 8, seed=k, dtype=torch.float64) for k in (0, 1))
    x_t = noise_path.add_noise(original, noise, TIMESTEPS)
    alpha, sigma = noise_path.alpha_sigma(TIMESTEPS, ndim=4)
    truth = {"epsilon": noise, "sample": original, "v_prediction": alpha * noise - sigma * original}
    truth["velocity"] = noise - original
    for kind, target in itertools.product(PREDICTION_TYPES, repeat=2):
        converted = convert_prediction(
            truth[kind], x_t, TIMESTEPS, noise_path=noise_path, prediction_type=kind, target=target
        )
        assert torch.allclose(converted, truth[target], atol=1e-11), (kind, target)


def test_moves_do_not_depend_on_the_prediction_type(noise_path):
    original, noise = (randn(4, 4, 8, 8, seed=k, dtype=torch.float64) for k in (0, 1))
    x_t = noise_path.add_noise(original, noise, TIMESTEPS)
    target = torch.tensor([499, 249, 9, CLEAN])
    expected = noise_path.add_noise(original, noise, target)
    for kind in PREDICTION_TYPES:
        output = convert_prediction(
            noise, x_t, TIMESTEPS, noise_path=noise_path, prediction_type="epsilon", target=kind
        )
        moved = move(output, x_t, TIMESTEPS, target, noise_path=noise_path, prediction_type=kind)
        assert torch.allclose(moved, expected, atol=1e-11), kind


def test_bfloat16_outputs_are_converted_in_float32(noise_path):
    x_t, output = randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    converted = convert_prediction(
        output.bfloat16(),
        x_t.bfloat16(),
        TIMESTEPS,
        noise_path=noise_path,
        prediction_type="epsilon",
        target="sample",
    )
    expected = convert_prediction(
        output.bfloat16().double(),
        x_t.bfloat16().double(),
        TIMESTEPS,
        noise_path=noise_path,
        prediction_type="epsilon",
        target="sample",
    )
    assert converted.dtype == torch.float32
    assert torch.allclose(converted.double(), expected, rtol=1e-5, atol=1e-4)


def test_implied_noise_is_the_epsilon_that_makes_the_move(noise_path):
    x_t, noise = randn(3, 4, 8, 8, dtype=torch.float64), randn(3, 4, 8, 8, seed=1, dtype=torch.float64)
    start, end = torch.tensor([999, 499, 249]), torch.tensor([499, 249, CLEAN])
    moved = move(noise, x_t, start, end, noise_path=noise_path, prediction_type="epsilon")
    assert torch.allclose(implied_noise(x_t, moved, start, end, noise_path=noise_path), noise, atol=1e-11)


def test_v_gives_x0_at_zero_terminal_snr_and_epsilon_is_refused_there():
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    noise_path = VariancePreserving.from_betas(betas, zero_terminal_snr=True)
    x_t, last = randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([999])
    v = randn(1, 4, 8, 8, seed=1, dtype=torch.float64)
    original = convert_prediction(
        v, x_t, last, noise_path=noise_path, prediction_type="v_prediction", target="sample"
    )
    assert torch.allclose(original, -v)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Denoiser(None, None, noise_path, "epsilon")
    assert Denoiser(None, None, noise_path, "epsilon", start_timestep=499).prediction_type == "epsilon"


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_linear_form_describes_what_x_t_is_made_of(noise_path, kind):
    """o = a x0 + b e with the coefficients of each kind, and det = alpha b - sigma a."""
    original, noise = (randn(4, 4, 8, 8, seed=k, dtype=torch.float64) for k in (0, 1))
    x_t = noise_path.add_noise(original, noise, TIMESTEPS)
    alpha, sigma = noise_path.alpha_sigma(TIMESTEPS, ndim=4)
    a, b, det = COEFFICIENTS[kind](alpha, sigma)
    assert torch.allclose(torch.as_tensor(alpha * b - sigma * a), torch.as_tensor(det).double(), atol=1e-12)
    both = to_original_and_noise(
        a * original + b * noise, x_t, TIMESTEPS, noise_path=noise_path, prediction_type=kind
    )
    for part, expected in zip(both, (original, noise), strict=True):
        assert torch.allclose(part, expected, atol=1e-10)


def test_guidance_1_is_off_and_guidance_0_is_unconditional():
    uncond, cond = randn(2, 3), randn(2, 3, seed=1)
    assert torch.allclose(guide(uncond, cond, 1.0), cond, atol=1e-6)
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    assert torch.allclose(guide(uncond, cond, 3.0), cond + 2 * (cond - uncond), atol=1e-5)


def test_an_unknown_prediction_type_is_refused(noise_path):
    x = randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="epsilon, sample, v_prediction"):
        convert_prediction(
            x, x, torch.tensor([3]), noise_path=noise_path, prediction_type="x0", target="sample"
        )
