"""Jackknife errors against closed forms and brute force."""

import pytest
import torch

from stepdistill.evaluation.measure.distances import fid, fid_without_each_group
from stepdistill.jackknife import difference_error, standard_error


def normal(count, size, seed):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_jackknife_error_of_a_mean_is_its_standard_error():
    values = normal(50, 1, 0).squeeze(1)
    without = [float((values.sum() - value) / 49) for value in values]
    assert standard_error(without) == pytest.approx(float(values.std() / 50**0.5), rel=1e-12)
    assert standard_error([3.0]) == standard_error([]) == 0.0


def test_variation_common_to_both_cancels_in_a_difference():
    first = [1.0, 2.0, 4.0]
    assert difference_error(first, [value + 7 for value in first]) == pytest.approx(0, abs=1e-12)
    assert difference_error(first, [0.0, 0.0, 0.0]) == standard_error(first)
    with pytest.raises(ValueError, match="shorter"):
        difference_error(first, first[:2])


@pytest.mark.parametrize("size", [3, 40])  # 40: covariances without full rank
def test_replicates_are_fids_of_the_remaining_images(size):
    images, reference = normal(30, size, 1), normal(25, size, 2) + 0.5
    replicates = fid_without_each_group(images, reference, groups=5)
    for group, value in enumerate(replicates):
        remaining = torch.stack([row for k, row in enumerate(images) if k % 5 != group])
        assert value == pytest.approx(fid(reference, remaining), rel=1e-6, abs=1e-6)


def test_the_error_equals_the_deviation_of_fids_of_many_sets():
    """For 60 sets of 200 samples, the mean jackknife error is within a fifth of the deviation of their FIDs."""
    reference = normal(200, 4, 0)
    sets = [normal(200, 4, seed) * 1.3 + 0.4 for seed in range(1, 61)]
    spread = torch.tensor([fid(reference, one) for one in sets]).std()
    errors = [standard_error(fid_without_each_group(one, reference)) for one in sets]
    assert sum(errors) / len(errors) == pytest.approx(float(spread), rel=0.2)
