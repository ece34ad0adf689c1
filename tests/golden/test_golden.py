"""Training gives the same weights, to the bit, as when the golden weights were recorded."""

import json
from pathlib import Path

import pytest

from tests.golden.cases import all_digests, cases, kernels
from tests.golden.compare import compare, differences, has_commit

GOLDEN = Path(__file__).with_name("golden.json")
FEW = [
    "as printed",
    "bf16",
    "prompts alone",
    "sd15_zero_snr",
    "sdxl, buckets",
]


def test_every_case_is_recorded():
    assert json.loads(GOLDEN.read_text())["cases"].keys() == cases().keys()


def test_a_changed_weight_and_a_missing_rung_are_named():
    before = {"a": {"8": "x", "4": "y"}, "b": {"2": "z"}}
    assert differences(before, before) == []
    assert differences(before, {"a": {"8": "x", "4": "w"}}) == [
        "a, 4-step rung: y before, w now",
        "b, 2-step rung: z before, None now",
    ]


@pytest.mark.slow
def test_training_reproduces_the_golden_weights(tmp_path):
    """Checks a few cases; `python tests/golden/compare.py COMMIT` checks all of them.

    Compares with the recorded digests if this CPU's kernels are those of the record, otherwise with the recorded commit,
    which is run here.
    """
    golden = json.loads(GOLDEN.read_text())
    if golden["kernels"] == kernels():
        recorded = {name: golden["cases"][name] for name in FEW}
        assert differences(recorded, dict(all_digests(tmp_path, FEW))) == []
    elif has_commit(golden["commit"]):
        assert compare(golden["commit"], tmp_path, FEW) == []
    else:
        pytest.skip("another CPU's kernels, and no history with the commit of the golden weights")
