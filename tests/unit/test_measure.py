"""Measuring a row: cached features, paired and unpaired distances, reference statistics."""

import numpy as np
import pytest
import torch

from stepdistill.config import ConfigError, Evaluation
from stepdistill.evaluation.measure.distances import Moments, fid
from stepdistill.evaluation.measure.image_sets import Distances, ImageSet


def image_set(folder, name, seed, *, n=40, by_prompt=True):
    images = torch.randint(
        0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    calls = []

    def batches():
        calls.append(name)
        yield from images.split(16)

    return ImageSet(f"{name}{seed}", folder / name, batches, by_prompt), calls


def test_features_are_computed_once_and_again_for_other_images_or_another_protocol(tmp_path):
    first, calls = image_set(tmp_path, "first", 0)
    second, others = image_set(tmp_path, "second", 1)
    distances = Distances(Evaluation(features="reader"))
    values = distances.to_real(first, second) | distances.to_teacher(first, second)
    assert (len(calls), len(others)) == (1, 1)
    assert values["fid_to_real"] == values["fid_to_teacher"] > 0
    assert set(values) == {
        *("fid_to_real", "kid_to_real", "kid_to_real_std", "precision", "recall", "density", "coverage"),
        *("fid_to_teacher", "kid_to_teacher", "kid_to_teacher_std"),
    }
    assert (
        Distances(Evaluation(features="reader")).to_teacher(first, second)["fid_to_teacher"]
        == values["fid_to_teacher"]
    )
    assert len(calls) == 1
    Distances(Evaluation(features="reader", resize="tf1")).to_teacher(first, second)
    assert len(calls) == 2
    changed, changed_calls = image_set(tmp_path, "first", 2)
    distances.to_teacher(changed, second)
    assert len(changed_calls) == 1


def test_only_paired_distances_are_0_for_the_teacher_itself(tmp_path):
    teacher, _ = image_set(tmp_path, "teacher", 0)
    other_seeds, _ = image_set(tmp_path, "floor", 1)
    distances = Distances(Evaluation(features="reader"))
    assert distances.paired_to_teacher(teacher, teacher) == {
        "paired_fid_to_teacher": pytest.approx(0, abs=1e-6),
        "relations_kept": pytest.approx(1, abs=1e-6),
    }
    floor = distances.to_teacher(teacher, other_seeds)["fid_to_teacher"]
    assert distances.paired_to_teacher(other_seeds, teacher)["paired_fid_to_teacher"] == pytest.approx(floor)
    assert len(distances.fid_replicates(teacher, other_seeds)) == 8


def test_reference_stats_replace_real_images(tmp_path):
    first, _ = image_set(tmp_path, "first", 0)
    second, _ = image_set(tmp_path, "second", 1)
    plain = Distances(Evaluation(features="reader"))
    moments = Moments.from_features(plain.main.features(second))
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    distances = Distances(Evaluation(features="reader", reference_stats=str(tmp_path / "stats.npz")))
    expected = fid(plain.main.features(second), plain.main.features(first))
    # roots of eigenvalues near 0 differ by CPU
    assert distances.to_real(first, None) == {"fid_to_real": pytest.approx(expected, rel=1e-7)}
    assert plain.to_real(first, None) == {}


def test_unusable_measures_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.patch_size: got 299; allowed: 32"):
        Distances(Evaluation(features="reader", patch_size=299))
    with pytest.raises(ValueError, match=r"stats\.npz"):
        Distances(Evaluation(features="reader", reference_stats=str(tmp_path / "stats.npz")))
