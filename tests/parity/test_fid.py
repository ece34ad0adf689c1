import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from stepdistill.evaluation.metrics import fid


class Pixels(nn.Module):
    """Features that are the pixels themselves: a Gaussian in, a Gaussian out."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return images.flatten(1).to(self.scale.dtype) * self.scale


def gaussian_images(mean, cov, seed):
    """uint8 (N, 3, 2, 2) whose pixels are Gaussian, rounded."""
    draws = np.random.default_rng(seed).multivariate_normal(mean, cov, size=4000)
    return torch.from_numpy(draws.round().clip(0, 255).astype(np.uint8)).reshape(-1, 3, 2, 2)


@pytest.fixture
def two_sets():
    root = np.random.default_rng(0).normal(size=(12, 12)) * 4
    first = gaussian_images(np.full(12, 120.0), root @ root.T + 30 * np.eye(12), 1)
    second = gaussian_images(np.linspace(100, 140, 12), 60 * np.eye(12), 2)
    return first, second


def test_fid_equals_the_closed_form_of_two_gaussians(two_sets):
    first, second = two_sets
    moments = [
        (x.flatten(1).double().numpy().mean(0), np.cov(x.flatten(1).double().numpy().T)) for x in two_sets
    ]
    (m1, c1), (m2, c2) = moments
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert fid(first, second, features=Pixels()) == pytest.approx(wanted, rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero(two_sets):
    assert abs(fid(two_sets[0], two_sets[0], features=Pixels())) < 1e-6


def test_fid_does_not_depend_on_the_batch_size(two_sets):
    values = [fid(*two_sets, features=Pixels(), batch_size=n) for n in (7, 4000)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
