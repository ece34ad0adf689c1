"""Commands in eval/: what a variant changes and what it costs, a smaller student's runs, points of the picture."""

import pytest
from front import point
from smaller import bases_text, configured
from variants import variant

from stepdistill import plan
from stepdistill.config.load import load_config


def letters(*overrides):
    return load_config("configs/letters.yaml", list(overrides))


def updates(config, kind):
    return [p.max_train_steps for rung in config.ladder for p in rung.phases if p.kinds == (kind,)]


def test_targets_used_more_often_pay_for_more_updates():
    base = letters()
    budget = plan.training_forwards(base)
    once, thrice = (variant(name).config(base, budget, 1.0) for name in ("targets-once", "targets-thrice"))
    for config in (once, thrice):
        assert plan.training_forwards(config) == pytest.approx(budget, rel=0.01)
    assert sum(updates(once, "mse")) < sum(updates(base, "mse")) < sum(updates(thrice, "mse"))
    mse = [phase for rung in thrice.ladder for phase in rung.phases if phase.kinds == ("mse",)]
    assert [p.cached_updates for p in mse] == pytest.approx([p.max_train_steps / 3 for p in mse], abs=1)


def test_smaller_batches_are_more_updates_of_mse_and_as_many_of_the_adversary():
    base = letters()
    budget = plan.training_forwards(base)
    config = variant("batch-16").config(base, budget, 1.0)
    assert config.training.train_batch_size == 16
    assert plan.training_forwards(config) == pytest.approx(budget, rel=0.01)
    for kind, factor in (("mse", 2.2), ("single", 1.1)):
        assert updates(config, kind) == pytest.approx([factor * n for n in updates(base, kind)], rel=0.05)


def test_a_variant_of_the_adversary_takes_the_passes_of_the_default():
    base = letters()
    budget = plan.training_forwards(base)
    for name, least, most in (("half-the-adversary", 0.5, 0.62), ("twice-the-adversary", 1.4, 1.6)):
        config = variant(name).config(base, budget, 1.0)
        assert plan.training_forwards(config) == pytest.approx(budget, rel=0.01)
        share = sum(updates(config, "single")) / sum(updates(base, "single"))
        assert least < share < most, name


def test_a_smaller_student_is_trained_with_and_without_features_beside_the_full_one():
    base = load_config("configs/letters_small.yaml")
    full, small, alone = (configured(base, name) for name in ("full", "small", "output-alone"))
    assert (full.name, small.name, alone.name) == ("full-s0", "small-s0", "output-alone-s0")
    assert full.shrink is None
    assert full.ladder == small.ladder == alone.ladder == base.ladder
    assert small.shrink == base.shrink
    assert [o.kind for o in small.shrink.objectives] == ["output", "denoise", "l2"]
    assert [o.kind for o in alone.shrink.objectives] == ["output", "denoise"]
    record = {"removed": ["middle"], "parameters": 60, "parameters_of_original": 100}
    assert "| small | middle | 60 % |" in bases_text({"full": {}, "small": record}).splitlines()


def test_a_point_is_the_mean_over_seeds_with_the_deviation_of_the_difference_from_the_default():
    tables = [
        {
            "a-4": {"fid_to_teacher": 10.0, "fid_to_real": 30.0},
            "default-4": {"fid_to_teacher": 11.0, "fid_to_real": 20.0},
        },
        {
            "a-4": {"fid_to_teacher": 14.0, "fid_to_real": 34.0},
            "default-4": {"fid_to_teacher": 15.0, "fid_to_real": 26.0},
        },
    ]
    assert point(tables, "a", 4) == [(12.0, 0.0), (32.0, pytest.approx(2**0.5))]
    assert point(tables[:1], "a", 4) == [(10.0, 0.0), (30.0, 0.0)]
