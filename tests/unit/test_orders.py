"""Whether two readers order methods alike: tau against scipy, and flips in made-up tables."""

import sys
from pathlib import Path

import pytest
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import orders
from side_by_side import Table

from stepdistill.jackknife import difference_error


def test_tau_equals_scipys_with_and_without_ties():
    generator = torch.Generator().manual_seed(0)
    for high in (3, 100):
        first, second = (torch.randint(0, high, (8,), generator=generator).tolist() for _ in range(2))
        expected = scipy.stats.kendalltau(first, second).statistic
        assert orders.kendall_tau(first, second) == pytest.approx(expected)
    assert orders.kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert orders.kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert orders.kendall_tau([1, 1], [2, 3]) is None


def test_a_pair_flips_only_beyond_both_deviations():
    first = orders.Side({"a": [1.0, 1.2, 1.1], "b": [2.0, 2.1, 2.3]})
    turned = orders.Side({"a": [9.0, 9.2, 9.3], "b": [5.0, 5.1, 5.5]})
    (flip,) = orders.flips(first, turned)
    assert flip.methods == ("a", "b")
    assert flip.by_first == pytest.approx((-1.0333, 0.1528), abs=1e-3)
    assert flip.by_second[0] == pytest.approx(3.9667, abs=1e-3)
    noisy = orders.Side({"a": [9.0, 2.0, 6.0], "b": [5.0, 5.1, 5.5]})
    assert orders.flips(first, noisy) == []
    assert orders.flips(first, first) == []


def test_with_one_seed_the_jackknife_gives_the_spread():
    steady, shaky = [9.9, 10.1, 10.0, 10.0], [9.0, 11.0, 8.0, 12.0]
    others = [11.9, 12.1, 12.0, 12.0]
    first = orders.Side({"a": [10.0], "b": [12.0]}, {"a": steady, "b": others})
    assert first.difference("a", "b") == (-2.0, pytest.approx(0, abs=1e-9))  # the same images move both alike
    turned = orders.Side({"a": [12.0], "b": [10.0]}, {"a": others, "b": shaky})
    mean, spread = turned.difference("a", "b")
    assert (mean, spread) == (2.0, pytest.approx(2 * difference_error(others, shaky)))
    assert spread > 2
    assert orders.flips(first, turned) == []
    certain = orders.Side({"a": [12.0], "b": [10.0]}, {"a": others, "b": steady})
    assert [flip.methods for flip in orders.flips(first, certain)] == [("a", "b")]


def table(first, second, replicates=None):
    rows = {
        f"{method}-4": {"fid_to_real": first[method], "second_fid_to_real": second[method]}
        for method in first
    }
    return Table(rows, None, Path(), replicates or {})


def test_the_text_names_tau_and_every_flip():
    methods = ["ours", "theirs", "others"]
    numbers = [{"ours": 10 + k, "theirs": 20 + k, "others": 30 + k} for k in range(3)]
    text, data = orders.agreement([table(n, n) for n in numbers], methods)
    assert "| FID to real |  | 1.00 |  |  |" in text
    assert text.endswith("over the seeds: 0.")
    turned = [{"ours": 25 + k, "theirs": 20 + k, "others": 30 + k} for k in range(3)]
    text, data = orders.agreement([table(*pair) for pair in zip(numbers, turned, strict=True)], methods)
    assert "| FID to real |  | 0.33 |  |  |" in text
    assert "over the seeds: 1." in text
    spread = {"fid_to_real": [1.0, 2.0, 3.0], "second_fid_to_real": [30.0, 5.0, 40.0]}
    constant = {"fid_to_real": [1.0, 2.0, 3.0], "second_fid_to_real": [1.0, 2.0, 3.0]}
    unsure = table(numbers[0], turned[0], {"ours-4": spread, "theirs-4": constant, "others-4": constant})
    assert orders.agreement([unsure], methods)[0].endswith("standard errors: 0.")
    assert (
        "- FID to real, 4 steps: ours less theirs is -10.0 ± 0.0 by the shipped reader, +5.0 ± 0.0 by" in text
    )
    assert [flip["methods"] for entry in data for flip in entry["flips"]] == [("ours", "theirs")]
    assert orders.agreement([Table({"ours-4": {"fid_to_real": 1.0}}, None, Path())], ["ours"]) == ("", [])
