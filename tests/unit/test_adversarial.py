import math

import pytest
import torch

from stepdistill.diffusion.schedule import CLEAN
from stepdistill.objectives.adversarial import (
    PERTURBATION_TIMESTEPS,
    accuracy,
    discriminator_loss,
    draw_perturbation,
    generator_loss,
    perturb,
)
from tests.conftest import randn


def test_losses_are_binary_cross_entropy_with_logits():
    real, fake = randn(8, 2), randn(8, 2, seed=1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    wanted = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    assert torch.allclose(discriminator_loss(real, fake), wanted)
    assert torch.allclose(generator_loss(fake), bce(fake, torch.ones_like(fake)))


def test_losses_at_chance_are_logs_of_two():
    zero = torch.zeros(4, 1)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))


def test_generator_gradient_does_not_saturate_where_d_is_sure():
    logits = torch.full((1, 1), -20.0, requires_grad=True)
    generator_loss(logits).backward()
    assert logits.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_accuracy_counts_the_right_side():
    logits = torch.tensor([[1.0], [2.0], [-1.0], [3.0]])
    assert accuracy(logits, is_teacher=True).item() == 0.75
    assert accuracy(logits, is_teacher=False).item() == 0.25


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [5, 1, 1, 1]])
def test_perturbation_is_drawn_by_weight_and_only_where_the_sample_is_clean(weights):
    uniform = torch.arange(8000, dtype=torch.float64) / 8000
    ends = torch.full((8000,), CLEAN)
    drawn = draw_perturbation(ends, uniform, weights=weights)
    for timestep, weight in zip(PERTURBATION_TIMESTEPS, weights, strict=True):
        assert (drawn == timestep).float().mean().item() == pytest.approx(weight / sum(weights), abs=1e-3)
    kept = draw_perturbation(torch.full((4,), 249), uniform[:4], weights=weights)
    assert kept.tolist() == [249] * 4


def test_perturbation_noises_clean_rows_alone_and_alike(schedule):
    sample, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    ends, seen_at = torch.tensor([CLEAN, 249]), torch.tensor([749, 249])
    found = perturb(sample, noise, ends, seen_at, schedule=schedule)
    alpha, sigma = schedule.alpha_sigma(seen_at, ndim=4, dtype=torch.float32)
    assert torch.allclose(found[0], (alpha * sample + sigma * noise)[0])
    assert torch.equal(found[1], sample[1])
    other = perturb(sample + 1, noise, ends, seen_at, schedule=schedule)
    assert torch.allclose(other[0] - found[0], alpha[0].expand(4, 8, 8), atol=1e-6)


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="4 numbers"):
        draw_perturbation(torch.tensor([CLEAN]), torch.tensor([0.5]), weights=[1, 1])
