"""float16: the loss is scaled; an update whose gradients overflow is skipped, and the scale is lowered."""

import functools

import pytest
import torch

from stepdistill.data.prepare import prepare
from stepdistill.ladder import distill, phases, read_rung_lora
from stepdistill.run.log import read_log
from tests.integration.conftest import tiny_config

PHASES = "[{objective: mse, max_train_steps: 8}, {objective: single, max_train_steps: 3}]"


@pytest.mark.slow
def test_every_rung_begins_with_the_same_loss_scale(tmp_path, monkeypatch):
    """Else a rung would come out otherwise if another process trains it than the one that trained the rung before."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=1))
    begun, run_phase = [], phases.run_phase

    def recorded(setup, *, runtime, **options):
        begun.append(runtime.loss_scale_state()["scale"])
        run_phase(setup, runtime=runtime, **options)
        begun.append(runtime.loss_scale_state()["scale"])

    monkeypatch.setattr(phases, "run_phase", recorded)
    rungs = [
        f"{{teacher_steps: {teacher}, student_steps: {student}, phases: [{{objective: mse, max_train_steps: 2}}]}}"
        for teacher, student in ((4, 2), (2, 1))
    ]
    config = tiny_config(
        tmp_path,
        "training.mixed_precision=fp16",
        "preview.looks_images=0",
        "training.train_batch_size=2",
        f"ladder=[{', '.join(rungs)}]",
    )
    prepare(config)
    assert distill(config) == [2, 1]
    first, after_first, second, _ = begun
    assert second == first != after_first


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
    weights = read_rung_lora(config.run_dir, 1)
    assert all(bool(tensor.isfinite().all()) and tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(bool(tensor.any()) for key, tensor in weights.items() if "lora_B" in key)
