"""float16: the loss is scaled; an update whose gradients overflow is skipped, and the scale is lowered."""

import functools

import pytest
import torch

from stepdistill.data.prepare import prepare
from stepdistill.ladder import distill, read_lora
from stepdistill.run.log import read_log
from tests.integration.conftest import tiny_config

PHASES = "[{objective: mse, max_train_steps: 8}, {objective: single, max_train_steps: 3}]"


@pytest.mark.slow
def test_an_update_that_overflows_is_left_out_and_the_next_ones_are_taken(tmp_path, monkeypatch):
    too_much = functools.partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", too_much)
    config = tiny_config(
        tmp_path,
        "training.mixed_precision=fp16",
        "preview.looks_images=0",  # float16 is slow on a CPU
        "training.train_batch_size=2",
        f"ladder=[{{teacher_steps: 2, student_steps: 1, phases: {PHASES}}}]",
    )
    prepare(config)
    assert distill(config) == [1]
    records = read_log(config.run_dir / "log.jsonl")
    left_out = [record.get("overflowed", 0.0) for record in records]
    assert left_out[0] == 1.0
    assert left_out[-1] == 0.0
    assert all(record["student_grad_norm"] > 0 for record in records if not record.get("overflowed"))
    weights = read_lora(config.run_dir, 1)
    assert all(bool(tensor.isfinite().all()) and tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(bool(tensor.any()) for key, tensor in weights.items() if "lora_B" in key)
