"""The noise path of flow-matching models: closed forms, and the moves and timesteps of diffusers' scheduler."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.grid import shift_of_length, trailing_nodes
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.prediction import convert_prediction
from stepdistill.diffusion.rectified_flow import RectifiedFlow
from stepdistill.diffusion.solver import move, rollout
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.objectives.adversarial import PERTURBATION_LEVELS
from stepdistill.objectives.mse import denoising_target, mse_loss
from tests.conftest import randn
from tests.unit.test_gaussian import exact_flow, predictor

SHIFTS = (1.0, 3.0)
EVERY = torch.tensor([999, 749, 250, 10])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [32, 8, 4, 2, 1])
def test_moves_and_times_equal_the_scheduler_of_diffusers(steps, shift):
    path = RectifiedFlow(shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    nodes = trailing_nodes(steps)
    scheduler.set_timesteps(sigmas=((np.array(nodes) + 1) / 1000).tolist())
    assert torch.allclose(path.network_times(path.nodes(steps)), scheduler.timesteps, rtol=1e-6)
    for told, (t, s) in zip(scheduler.timesteps, itertools.pairwise([*nodes, CLEAN]), strict=True):
        sample, output = randn(2, 4, 8, 8, seed=t), randn(2, 4, 8, 8, seed=t + 1)
        theirs = scheduler.step(output, told, sample).prev_sample
        start, end = torch.full((2,), t), torch.full((2,), s)
        ours = move(output, sample, start, end, noise_path=path, prediction_type="velocity")
        assert torch.allclose(ours, theirs, atol=2e-6), (t, s)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_that_of_the_scheduler(kind):
    lengths = {"base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **lengths)
    shift = shift_of_length(1024, base_length=256, max_length=4096, kind=kind, **lengths)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5 + 0.65 * (1024 - 256) / (4096 - 256))
    path = RectifiedFlow(shift)
    assert torch.allclose(path.network_times(path.nodes(4)), scheduler.timesteps, rtol=1e-6)
    with pytest.raises(ValueError, match="exponential, linear"):
        shift_of_length(1, base_length=0, max_length=1, kind="cubic", **lengths)


@pytest.mark.parametrize("shift", SHIFTS)
def test_rollouts_converge_to_the_exact_flow_at_first_order(shift):
    path, sample = RectifiedFlow(shift), randn(64, 1, dtype=torch.float64)
    expected = exact_flow(path, sample, 999, CLEAN)
    errors = []
    for steps in (8, 32, 128, 1000):
        options = {"noise_path": path, "prediction_type": "velocity"}
        result = rollout(predictor(path, "velocity"), sample, path.sampling(steps, 64), **options)
        errors.append((result - expected).abs().max().item())
    assert errors[3] < 0.01
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def same_snr(flow):
    """The variance-preserving path with the flow's ratio of signal to noise at every timestep."""
    alpha, sigma = flow.alpha_sigma(torch.arange(flow.num_train_timesteps))
    return VariancePreserving(alpha**2 / (alpha**2 + sigma**2))


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_v_teacher_and_a_flow_teacher_of_one_gaussian_give_the_same_images_and_losses(shift):
    flow = RectifiedFlow(shift)
    preserving = same_snr(flow)
    noise, other = (randn(16, 1, seed=k, dtype=torch.float64) for k in (0, 1))
    images, losses = [], []
    for path, kind in ((preserving, "v_prediction"), (flow, "velocity")):
        moves = path.sampling(8, 16)
        options = {"noise_path": path, "prediction_type": kind}
        images.append(rollout(predictor(path, kind), noise, moves, **options))
        ends = torch.full((16,), CLEAN)
        start = torch.full((16,), 499)
        x_t = path.add_noise(other, noise, start)
        one, many = (
            rollout(predictor(path, kind), x_t, path.substeps([499] * 16, [CLEAN] * 16, n), **options)
            for n in (1, 32)
        )
        spaces = ("prev_sample", "epsilon", "sample", "truncated_snr")
        losses += [[mse_loss(one, many, start, ends, noise_path=path, space=s).item() for s in spaces]]
    assert torch.allclose(*images, atol=1e-10)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_loss_in_velocity_is_the_error_of_the_velocity(shift):
    path, ends = RectifiedFlow(shift), torch.tensor([749, 499, 9, CLEAN])
    x_t, first, second = (randn(4, 3, seed=k, dtype=torch.float64) for k in range(3))
    options = {"noise_path": path, "prediction_type": "velocity"}
    moved = [move(output, x_t, EVERY, ends, **options) for output in (first, second)]
    loss = mse_loss(*moved, EVERY, ends, noise_path=path, space="velocity")
    assert loss.item() == pytest.approx((first - second).square().mean().item(), rel=1e-12)


def test_all_losses_are_finite_where_the_path_is_pure_noise():
    path, start, end = RectifiedFlow(3.0), torch.tensor([999]), torch.tensor([CLEAN])
    student, teacher = randn(1, 3), randn(1, 3, seed=1)
    for space in ("prev_sample", "epsilon", "sample", "velocity", "truncated_snr"):
        assert mse_loss(student, teacher, start, end, noise_path=path, space=space).isfinite(), space


def test_the_exact_output_denoises():
    path = RectifiedFlow(3.0)
    original, noise = (randn(4, 3, seed=k, dtype=torch.float64) for k in (0, 1))
    x_t = path.add_noise(original, noise, EVERY)
    exact = denoising_target(original, noise, EVERY, noise_path=path, prediction_type="velocity")
    options = {"noise_path": path, "prediction_type": "velocity"}
    assert torch.allclose(
        convert_prediction(exact, x_t, EVERY, target="sample", **options), original, atol=1e-12
    )
    assert torch.allclose(
        convert_prediction(exact, x_t, EVERY, target="epsilon", **options), noise, atol=1e-12
    )


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_path_goes_from_pure_noise_to_the_clean_sample(shift):
    path = RectifiedFlow(shift)
    alpha, sigma = path.alpha_sigma(torch.tensor([999, 499, CLEAN]))
    assert alpha.tolist() == pytest.approx([0.0, 1 - shift / (1 + shift), 1.0])
    assert (alpha + sigma).tolist() == pytest.approx([1.0] * 3)
    assert path.ends_in_pure_noise
    assert path.to("cpu") == path


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_discriminator_sees_samples_at_the_papers_noise_levels(shift):
    path = RectifiedFlow(shift)
    timesteps = torch.tensor([path.timestep_at(level) for level in PERTURBATION_LEVELS])
    _, sigma = path.alpha_sigma(timesteps)
    assert sigma.tolist() == pytest.approx(list(PERTURBATION_LEVELS), abs=2e-3)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(ValueError, match="allowed: numbers above 0"):
        RectifiedFlow(shift)
