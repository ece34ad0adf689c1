"""The resize protocols on white noise, where they differ most, each against an independent reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.evaluation.measure.resize import RESIZES, center_crop, resize

PROTOCOL = Path(__file__).parents[2] / "eval" / "protocol.md"


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 96, 128), dtype=np.uint8))


def test_protocols_keep_the_variance_of_white_noise_as_documented():
    """Downscaling by 4, tf1 picks single pixels and keeps all variance; an antialiasing triangle leaves (1/6)^2 of it."""
    big = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, 1024, 1024), dtype=np.uint8))
    share = {
        size: {name: float(resize(big, name, size=size).var() / big.float().var()) for name in RESIZES[1:]}
        for size in (299, 256)
    }
    assert share[256]["tf1"] == pytest.approx(1.0, abs=0.02)
    assert share[256]["torchmetrics"] == pytest.approx((1 / 6) ** 2, rel=0.05)
    for size, row in share.items():
        line = next(x for x in PROTOCOL.read_text().splitlines() if x.startswith(f"| 1024 -> {size} |"))
        documented = [float(cell) for cell in line.split("|")[2:-1]]
        assert list(row.values()) == pytest.approx(documented, rel=0.02, abs=0.0005)


def test_tf1_equals_a_loop_over_pixels(noise):
    size = 50
    image = noise[0, 1].double().numpy()
    height, width = image.shape
    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[below, left] + (image[below, right] - image[below, left]) * (x - left)
            expected[i, j] = upper + (lower - upper) * (y - top)
    assert np.allclose(resize(noise, "tf1", size=size)[0, 1].numpy(), expected, atol=1e-3)


def test_tf1_enlarges_with_the_same_formula():
    ramp = torch.arange(4, dtype=torch.uint8).mul(10).expand(1, 3, 4, 4)
    assert resize(ramp, "tf1", size=8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]


def test_antialiased_bilinear_is_pils_up_to_its_rounding(noise):
    for size in (40, 299):
        image = Image.fromarray(noise[0].permute(1, 2, 0).numpy())
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        result = resize(noise, "torchmetrics", size=size)[0].permute(1, 2, 0).numpy()
        assert np.abs(result - expected).max() <= 1.01


def test_pil_bicubic_is_not_quantised_and_stays_in_range(noise):
    result = resize(noise, "pil_bicubic", size=64)
    assert result.min() >= 0
    assert result.max() <= 255
    assert (result != result.round()).float().mean() > 0.9
    edges = (noise > 127).to(torch.uint8) * 255
    overshoot = Image.fromarray(edges[0, 0].numpy().astype(np.float32)).resize(
        (299, 299), Image.Resampling.BICUBIC
    )
    assert overshoot.getextrema()[0] < -10
    clipped = resize(edges, "pil_bicubic", size=299)
    assert (clipped.min(), clipped.max()) == (0, 255)
    middling = noise // 2 + 64  # PIL clips 8 bit between its two passes, which floating point does not
    image = Image.fromarray(middling[0].permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    result = resize(middling, "pil_bicubic", size=64)
    assert np.abs(result[0].permute(1, 2, 0).numpy() - expected).max() <= 1.01


def test_lanczos512_goes_through_512_in_8_bit(noise):
    image = Image.fromarray(noise[0].permute(1, 2, 0).numpy()).resize((512, 512), Image.Resampling.LANCZOS)
    middle = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert torch.equal(resize(noise[:1], "lanczos512", size=99), resize(middle, "torchmetrics", size=99))


def test_none_leaves_the_pixels_unchanged_and_an_unknown_protocol_is_refused(noise):
    assert torch.equal(resize(noise, "none", size=5), noise.float())
    with pytest.raises(ValueError, match="allowed: none, torchmetrics"):
        resize(noise, "bicubic", size=5)


def test_center_crop_returns_the_centre(noise):
    crop = center_crop(noise, 32)
    assert torch.equal(crop, noise[:, :, 32:64, 48:80])
    with pytest.raises(ValueError, match=r"patch_size: got 97; allowed: up to 96"):
        center_crop(noise, 97)
