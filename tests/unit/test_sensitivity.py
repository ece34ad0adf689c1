"""Blur, noise, a lost mode and a colour cast each move the metric that should see them, on rendered letters."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from stepdistill.demo import letters
from stepdistill.evaluation.measure.distances import density_coverage, diversity, fid, kid, precision_recall
from stepdistill.evaluation.measure.features import build_extractor, extract_features
from stepdistill.images.drift import image_drift

N = 400


def rendered(triples, seed):
    pixels = [np.asarray(letters.render_at(t, seed=seed, index=i)) for i, t in enumerate(triples)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def sets():
    """Features and images of each change; "same" is another draw from the same world."""
    triples = letters.sample_triples(N, seed=0)
    real, same = rendered(triples, 1), rendered(triples, 2)
    one_ink = rendered([letters.Triple(t.letter, 0, t.paper) for t in triples], 2)
    noise = torch.randn(same.shape, generator=torch.Generator().manual_seed(0)) * 50
    cast = same.float()
    cast[:, 2] -= 40
    changed = {
        "real": real,
        "same": same,
        "blur": avg_pool2d(same.float(), 5, stride=1, padding=2, count_include_pad=False),
        "noise": same + noise,
        "lost mode": one_ink,
        "two at once": (same.float() + same.roll(7, 0).float()) / 2,
        "colour": cast,
    }
    images = {name: x.float().round().clamp(0, 255).to(torch.uint8) for name, x in changed.items()}
    extractor = build_extractor("reader")
    return {name: (extract_features([x], extractor, resize="none"), x) for name, x in images.items()}


@pytest.mark.parametrize(
    ("change", "times"), [("blur", 3), ("noise", 1.5), ("lost mode", 10), ("two at once", 5), ("colour", 3)]
)
def test_fid_sees_every_change(sets, change, times):
    """Noise has the smallest effect, because the reader was trained to ignore it."""
    real, same, changed = sets["real"][0], sets["same"][0], sets[change][0]
    assert fid(real, changed) > times * fid(real, same)


@pytest.mark.parametrize("change", ["lost mode", "two at once", "colour"])
def test_kid_sees_every_change_beyond_its_deviation(sets, change):
    real, same, changed = sets["real"][0], sets["same"][0], sets[change][0]
    near, far = (kid(real, x, gamma=1e-4, subset_size=200, subsets=20, paired=True) for x in (same, changed))
    assert abs(near[0]) < near[1]
    assert far[0] > near[0] + 2 * near[1]


def test_a_lost_mode_lowers_recall_and_coverage_but_not_precision(sets):
    real, same, lost = sets["real"][0], sets["same"][0], sets["lost mode"][0]
    assert precision_recall(real, lost)[0] > 0.95
    assert precision_recall(real, lost)[1] < precision_recall(real, same)[1] - 0.5
    assert density_coverage(real, lost)[1] < density_coverage(real, same)[1] - 0.05


def test_blends_of_two_images_lower_precision_and_density(sets):
    real, same, mixed = sets["real"][0], sets["same"][0], sets["two at once"][0]
    assert precision_recall(real, mixed)[0] < precision_recall(real, same)[0] - 0.1
    assert density_coverage(real, mixed)[0] < density_coverage(real, same)[0] - 0.15


def test_seeds_that_differ_less_lower_diversity():
    triples = letters.sample_triples(8, seed=5)

    def spread(mixing):
        images = torch.stack([rendered(triples, seed) for seed in range(6)], dim=1).float()
        first = images[:, :1]
        mixed = (images + mixing * (first - images)).round().to(torch.uint8).flatten(0, 1)
        return diversity(
            extract_features([mixed], build_extractor("reader"), resize="none").reshape(8, 6, -1)
        )

    assert spread(1.0) == 0
    assert spread(0.7) < 0.7 * spread(0.0)


def test_drifts_have_the_right_sign(sets):
    drift = {name: image_drift([x], [sets["same"][1]]) for name, (_, x) in sets.items()}
    assert drift["blur"]["sharpness_drift"] < -0.5
    assert drift["noise"]["sharpness_drift"] > 0.5
    assert drift["colour"]["colour_drift"] > 15
    assert drift["blur"]["colour_drift"] < 1
    assert drift["two at once"]["contrast_drift"] < -0.05
