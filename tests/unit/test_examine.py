"""Weights files with numbers that are not finite are found, in every dtype of weights."""

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.teacher.examine import not_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_non_finite_number_among_a_thousand_is_found(dtype, place, tmp_path):
    finite = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    others = {"a": finite, "largest": largest, "empty": torch.zeros(0, dtype=dtype), "count": torch.tensor(3)}
    save_file(others, tmp_path / "good.safetensors")
    assert not_finite([tmp_path / "good.safetensors"]) is None
    for odd in (float("nan"), float("inf"), -float("inf")):
        if dtype is torch.float8_e4m3fn and odd == odd:
            continue  # it has no infinity
        bad = finite.float() if dtype.itemsize == 1 else finite.clone()
        bad[place] = odd
        save_file({**others, "bad": bad.to(dtype)}, tmp_path / "bad.safetensors")
        assert not_finite([tmp_path / "good.safetensors", tmp_path / "bad.safetensors"]) == "bad"
