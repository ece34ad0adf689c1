"""The mse loss in each loss space, and the convert loss."""

import pytest
import torch

from stepdistill.diffusion.prediction import convert_prediction
from stepdistill.diffusion.solver import move, move_gain
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.objectives.mse import LOSS_SPACES, convert_loss, mse_loss, space_weight
from tests.conftest import ends_of, randn


@pytest.mark.parametrize("steps", [32, 8, 4, 2, 1])
def test_the_prev_sample_loss_is_the_epsilon_loss_times_the_squared_gain(noise_path, steps):
    timesteps = noise_path.nodes(steps)
    ends = ends_of(noise_path, timesteps, steps)
    x_t = randn(steps, 4, 8, 8, dtype=torch.float64)
    first, second = (randn(steps, 4, 8, 8, seed=k, dtype=torch.float64) for k in (1, 2))
    moved = [
        move(e, x_t, timesteps, ends, noise_path=noise_path, prediction_type="epsilon")
        for e in (first, second)
    ]
    gain = move_gain(timesteps, ends, noise_path=noise_path)
    per_row = (first - second).square().flatten(1).mean(1)
    weighed = mse_loss(*moved, timesteps, ends, noise_path=noise_path, space="prev_sample")
    assert torch.allclose(weighed, (gain**2 * per_row).mean(), rtol=1e-10)
    plain = mse_loss(*moved, timesteps, ends, noise_path=noise_path, space="epsilon")
    assert torch.allclose(plain, per_row.mean(), rtol=1e-9)


@pytest.mark.parametrize(("steps", "mean_square"), [(32, 0.014), (8, 0.33), (4, 2.3), (2, 24.8), (1, 213.6)])
def test_the_mean_squared_gain_of_each_rung_is_as_documented(noise_path, steps, mean_square):
    timesteps = noise_path.nodes(steps)
    gain = move_gain(timesteps, ends_of(noise_path, timesteps, steps), noise_path=noise_path)
    assert gain.square().mean().item() == pytest.approx(mean_square, rel=0.04)


@pytest.mark.parametrize("space", ["epsilon", "sample", "v_prediction"])
def test_each_loss_space_measures_the_error_of_its_prediction_type(noise_path, space):
    timesteps = noise_path.nodes(4)
    ends = ends_of(noise_path, timesteps, 4)
    x_t = randn(4, 4, 8, 8, dtype=torch.float64)
    first, second = (randn(4, 4, 8, 8, seed=k, dtype=torch.float64) for k in (1, 2))
    as_space = [
        convert_prediction(e, x_t, timesteps, noise_path=noise_path, prediction_type="epsilon", target=space)
        for e in (first, second)
    ]
    moved = [
        move(e, x_t, timesteps, ends, noise_path=noise_path, prediction_type="epsilon")
        for e in (first, second)
    ]
    loss = mse_loss(*moved, timesteps, ends, noise_path=noise_path, space=space)
    assert torch.allclose(loss, (as_space[0] - as_space[1]).square().mean(), rtol=1e-9)


def test_an_unknown_loss_space_is_refused(noise_path):
    with pytest.raises(ValueError, match=", ".join(LOSS_SPACES)):
        space_weight(torch.tensor([999]), torch.tensor([499]), noise_path=noise_path, space="latent")


def test_convert_loss_is_the_plain_mean_square():
    first, second = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    assert torch.allclose(convert_loss(first, second), ((first - second) ** 2).mean())


def test_truncated_snr_is_the_x0_error_weighed_by_the_larger_of_snr_and_one(noise_path):
    timesteps = noise_path.nodes(8)
    ends = ends_of(noise_path, timesteps, 8)
    alpha, sigma = noise_path.alpha_sigma(timesteps)
    weight = space_weight(timesteps, ends, noise_path=noise_path, space="truncated_snr")
    on_sample = space_weight(timesteps, ends, noise_path=noise_path, space="sample")
    assert torch.allclose(weight, on_sample * ((alpha / sigma) ** 2).clamp(min=1), rtol=1e-9)


@pytest.mark.parametrize("steps", [32, 8, 4, 2, 1])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("space", ["sample", "v_prediction", "truncated_snr", "prev_sample"])
def test_every_loss_space_but_epsilon_is_exact_at_zero_terminal_snr(kind, space, steps):
    """The loss between two students that predict v or x0 equals the error of their predictions, converted to that space."""
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    noise_path = VariancePreserving.from_betas(betas, zero_terminal_snr=True)
    timesteps = noise_path.nodes(steps)
    ends = ends_of(noise_path, timesteps, steps)
    x_t, *outputs = (randn(steps, 4, 8, 8, seed=k, dtype=torch.float64) for k in range(3))
    moved = [move(o, x_t, timesteps, ends, noise_path=noise_path, prediction_type=kind) for o in outputs]
    loss = mse_loss(*moved, timesteps, ends, noise_path=noise_path, space=space)

    def error(target):
        first, second = (
            convert_prediction(o, x_t, timesteps, noise_path=noise_path, prediction_type=kind, target=target)
            for o in outputs
        )
        return (first - second).square().flatten(1).mean(1)

    alpha, sigma = noise_path.alpha_sigma(timesteps)
    expected = {
        "sample": error("sample"),
        "v_prediction": error("v_prediction"),
        "truncated_snr": error("sample") * ((alpha / sigma) ** 2).clamp(min=1),
        "prev_sample": (moved[0] - moved[1]).square().flatten(1).mean(1),
    }[space]
    assert bool((expected > 0).all())
    assert torch.allclose(loss, expected.mean(), rtol=1e-9)
    assert float(space_weight(timesteps, ends, noise_path=noise_path, space="epsilon")[0]) == 0
