"""The commands in eval/ can be imported, and eval/bench.py measures each of its parts on a tiny run."""

import importlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from bench import PARTS, main
from timing.on_gpu import on_gpu

from eval.random_teacher import build
from stepdistill.plan.cards import card_of

COMMANDS = sorted(path.stem for path in Path("eval").glob("*.py"))
SMALL = ["training.train_batch_size=2", "evaluation.teacher_steps=[4]", "preview.looks_images=0"]
# so many that no second pass over the data begins within the leak test: the order of its rows is one more tensor
SMALL += ["data.num_images=160"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_imported(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.slow
def test_every_part_is_measured_and_written(tmp_path):
    output = tmp_path / "bench.json"
    assert main(["configs/letters.yaml", *SMALL, "--iterations", "1", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    expected = set(PARTS) - (set() if torch.cuda.is_available() else {"gpu"})
    assert set(results) == expected | {"environment"}
    assert all(row["iteration_seconds"] > 0 and row["bare_seconds"] > 0 for row in results["rows"])
    assert [row["mixed_precision"] for row in results["lcm"]] == ["no", "bf16"]
    assert all(row["ours_seconds"] > 0 and row["plain_seconds"] > 0 for row in results["lcm"])
    assert results["host"]["switch_ms"] < 0.1
    assert results["checkpoint"]["bytes"] > 10_000
    assert results["processes"]["two_seconds"] > 0
    for slopes in results["leaks"].values():
        assert slopes["tensors_per_update"] == 0
        assert slopes["bytes_per_update"] < 20_000  # a sample's latents have 4 KiB


def _rows(teacher):
    overrides = [f"teacher.path={teacher}", "training.train_batch_size=1", "lora.rank=4"]
    return list(on_gpu(card_of("24GB"), "configs/sdxl_24gb.yaml", False, overrides))


@pytest.mark.slow
def test_the_part_for_a_gpu_runs_on_any_device(tmp_path):
    """Its full-size configs need a GPU; here a tiny SDXL stands for them."""
    build("sdxl", tiny=True).save_pretrained(tmp_path / "teacher")
    # in a new process: this one may give memory of earlier tests back while it is measured
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        rows = process.submit(_rows, str(tmp_path / "teacher")).result()
    assert {row["phase"].split()[-1] for row in rows} >= {"mse", "single"}
    for row in rows:
        assert row["bytes"] > 0
        assert row["seconds"] > row["planned_seconds"] > 0


def test_no_part_begins_after_the_time(capsys):
    assert main(["configs/letters.yaml", "--only", "host", "--minutes", "1e-9"]) == 0
    assert "host: no time left" in capsys.readouterr().out
