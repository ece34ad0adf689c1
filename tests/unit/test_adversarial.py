"""The adversarial losses, the discriminator's accuracy, and the perturbation of clean samples."""

import math

import pytest
import torch

from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.objectives.adversarial import (
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
    expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    assert torch.allclose(discriminator_loss(real, fake), expected)
    assert torch.allclose(generator_loss(fake, real), bce(fake, torch.ones_like(fake)))


def test_losses_at_chance_are_logs_of_two():
    zero = torch.zeros(4, 1)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero, zero).item() == pytest.approx(math.log(2))


def test_generator_gradient_does_not_saturate_when_the_discriminator_is_sure():
    logits = torch.full((1, 1), -20.0, requires_grad=True)
    generator_loss(logits, logits.detach()).backward()
    assert logits.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_relativistic_losses_depend_only_on_the_difference_of_logits():
    real, fake = randn(8, 2), randn(8, 2, seed=1)
    for shift in (0.0, 7.0):
        loss = discriminator_loss(real + shift, fake + shift, kind="relativistic")
        assert torch.allclose(loss, -torch.sigmoid(real - fake).log().mean(), atol=1e-5)
        other = generator_loss(fake + shift, real + shift, kind="relativistic")
        assert torch.allclose(other, -torch.sigmoid(fake - real).log().mean(), atol=1e-5)


def test_accuracy_counts_logits_on_the_correct_side():
    teacher, student = (
        torch.tensor([[1.0], [2.0], [-1.0], [3.0]]),
        torch.tensor([[1.0], [-2.0], [4.0], [5.0]]),
    )
    assert [a.item() for a in accuracy(teacher, student)] == [0.75, 0.25]
    right = accuracy(teacher + 100, student + 100, kind="relativistic")
    assert [a.item() for a in right] == [0.25, 0.25]  # one pair of four, whatever both are shifted by


def test_an_unknown_kind_of_loss_is_refused():
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="non_saturating, relativistic"):
        discriminator_loss(zero, zero, kind="hinge")
    with pytest.raises(ValueError, match="non_saturating, relativistic"):
        generator_loss(zero, zero, kind="hinge")


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [5, 1, 1, 1]])
def test_perturbation_is_drawn_by_weight_and_only_for_clean_samples(noise_path, weights):
    uniform = torch.arange(8000, dtype=torch.float64) / 8000
    ends = torch.full((8000,), CLEAN)
    drawn = draw_perturbation(ends, uniform, weights=weights, noise_path=noise_path)
    for timestep, weight in zip((9, 249, 499, 749), weights, strict=True):
        assert (drawn == timestep).float().mean().item() == pytest.approx(weight / sum(weights), abs=1e-3)
    unchanged = draw_perturbation(torch.full((4,), 249), uniform[:4], weights=weights, noise_path=noise_path)
    assert unchanged.tolist() == [249] * 4


def test_perturbation_adds_noise_to_clean_rows_only(noise_path):
    sample, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    ends, seen_at = torch.tensor([CLEAN, 249]), torch.tensor([749, 249])
    perturbed = perturb(sample, noise, ends, seen_at, noise_path=noise_path)
    alpha, sigma = noise_path.alpha_sigma(seen_at, ndim=4, dtype=torch.float32)
    assert torch.allclose(perturbed[0], (alpha * sample + sigma * noise)[0])
    assert torch.equal(perturbed[1], sample[1])
    other = perturb(sample + 1, noise, ends, seen_at, noise_path=noise_path)
    assert torch.allclose(other[0] - perturbed[0], alpha[0].expand(4, 8, 8), atol=1e-6)


@pytest.mark.parametrize(("count", "timesteps"), [(1000, [9, 249, 499, 749]), (500, [4, 124, 249, 374])])
def test_perturbation_timesteps_are_the_same_shares_of_any_schedule(count, timesteps):
    path = VariancePreserving(torch.linspace(1, 0, count, dtype=torch.float64))
    uniform = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    ends = torch.full((4,), CLEAN)
    drawn = draw_perturbation(ends, uniform, weights=[1, 1, 1, 1], noise_path=path)
    assert drawn.tolist() == timesteps


def test_wrong_perturbation_weights_are_refused(noise_path):
    with pytest.raises(ValueError, match="4 numbers"):
        draw_perturbation(torch.tensor([CLEAN]), torch.tensor([0.5]), weights=[1, 1], noise_path=noise_path)
