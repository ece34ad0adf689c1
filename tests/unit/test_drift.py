"""Drift of colour, contrast and sharpness between two sets of images."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from stepdistill.images.drift import image_drift


def images(seed=0, n=40):
    return torch.randint(
        40, 200, (n, 3, 24, 24), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_equal_images_have_no_drift_in_batches_of_any_size():
    x = images()
    assert image_drift([x], x.split(7)) == pytest.approx(
        {"colour_drift": 0, "contrast_drift": 0, "sharpness_drift": 0}, abs=1e-12
    )


def test_each_change_moves_its_measure():
    x = images()
    redder = x.clone()
    redder[:, 0] += 10
    drift = image_drift([redder], [x])
    assert drift["colour_drift"] == pytest.approx(10 / 3**0.5, rel=1e-9)
    assert drift["contrast_drift"] == pytest.approx(0, abs=1e-9)
    flatter = ((x.double() - 120) * 0.5 + 120).round().to(torch.uint8)
    drift = image_drift([flatter], [x])
    assert drift["contrast_drift"] == pytest.approx(-0.5, abs=0.01)
    assert drift["sharpness_drift"] == pytest.approx(-0.75, abs=0.01)
    blurred = avg_pool2d(x.float(), 3, stride=1, padding=1, count_include_pad=False).round().to(torch.uint8)
    assert image_drift([blurred], [x])["sharpness_drift"] < -0.9
    assert image_drift([x], [blurred])["sharpness_drift"] > 5


def test_contrast_weighs_the_primaries_as_luma_does():
    grey = images()[:, :1]
    red, green, blue = (torch.cat([grey * (k == j) for j in range(3)], dim=1) for k in range(3))
    assert image_drift([red], [green])["contrast_drift"] == pytest.approx(0.299 / 0.587 - 1, rel=1e-9)
    assert image_drift([blue], [green])["contrast_drift"] == pytest.approx(0.114 / 0.587 - 1, rel=1e-9)


def test_a_gradient_of_brightness_is_not_sharpness():
    x = images()
    brighter = x + torch.arange(24, dtype=torch.uint8) * 2
    assert image_drift([brighter], [x])["sharpness_drift"] == pytest.approx(0, abs=1e-9)


def test_flat_images_have_no_drift_from_flat_images():
    flat = torch.full((2, 3, 8, 8), 99, dtype=torch.uint8)
    drift = image_drift([flat], [flat // 3])
    assert drift == {"colour_drift": pytest.approx(66), "contrast_drift": 0, "sharpness_drift": 0}


def test_sets_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="40 images against 39"):
        image_drift([images()], [images()[1:]])
