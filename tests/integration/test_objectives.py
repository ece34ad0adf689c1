"""Shipped configs with several objectives in a phase, shortened, through all stages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepdistill import stages
from stepdistill.config.load import load_config
from stepdistill.run.log import read_log
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.slow


def shortened(name, folder, *overrides):
    """A shipped config with two updates of the student in each phase."""
    path = f"configs/{name}.yaml"
    phases = [
        f"ladder.{index}.phases.{number}.max_train_steps={2 * phase.updates_per_student_update}"
        for index, rung in enumerate(load_config(path).ladder)
        for number, phase in enumerate(rung.phases)
    ]
    return load_config(path, [f"output_dir={folder}", *SMALL, *phases, *overrides])


def test_a_ladder_with_features_is_trained_exported_and_reported(tmp_path):
    config = shortened("letters_features", tmp_path)
    stages.run_all(config)
    results = json.loads((config.run_dir / "report" / "results.json").read_text())
    assert {"student-8", "student-4", "student-2", "student-1"} < {row["row"] for row in results["rows"]}
    lines = [line for line in read_log(config.run_dir / "log.jsonl") if line["rung"] == 4]
    assert [line["objective"] for line in lines] == ["mse+l2+relations"] * 2
    first, last = lines
    for kind in ("mse", "l2", "relations"):
        assert first[f"{kind}_loss"] > 0
        assert first[f"{kind}_grad_norm"] > 0  # measured on the first update, not on the second
        assert f"{kind}_grad_norm" not in last
    shares = {
        kind: first[f"{kind}_weight"] * first[f"{kind}_grad_norm"] for kind in ("mse", "l2", "relations")
    }
    assert shares["l2"] == pytest.approx(0.1 * shares["mse"], rel=1e-4)
    assert shares["relations"] == pytest.approx(0.05 * shares["mse"], rel=1e-4)
    assert last["relations_weight"] == 0.0
    assert (Path(config.run_dir) / "rungs" / "4" / "pytorch_lora_weights.safetensors").is_file()


def test_the_ladder_of_the_flow_teacher_is_trained_exported_and_reported(tmp_path):
    config = shortened("letters_sd3", tmp_path)
    stages.run_all(config)
    results = json.loads((config.run_dir / "report" / "results.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    assert {"student-8", "student-4", "student-2", "student-1"} < rows.keys()
    assert rows["teacher-32"]["prompt_accuracy"] > 0.8
    weights = load_file(config.run_dir / "rungs" / "1" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in weights)


def test_a_ladder_by_distribution_matching_is_trained_exported_and_reported(tmp_path):
    config = shortened("letters_dmd2", tmp_path, "ladder.2.phases.1.max_train_steps=11")
    stages.run_all(config)
    report = config.run_dir / "report"
    results = json.loads((report / "results.json").read_text())
    assert {"student-8", "student-4", "student-2", "student-1"} < {row["row"] for row in results["rows"]}
    assert "Loss of the fake score" in (report / "index.html").read_text()
    lines = [
        line for line in read_log(config.run_dir / "log.jsonl") if line["rung"] == 4 and line["phase"] == 1
    ]
    assert [line["objective"] for line in lines] == ["dmd+single"] * 11
    for step, line in enumerate(lines):
        learns = step in (4, 9)
        assert ("student_loss" in line) == ("student_lr" in line) == ("dmd_loss" in line) == learns
        assert line["fake_score_loss"] > 0
        assert line["fake_score_grad_norm"] > 0
        assert line["discriminator_loss"] > 0
    weights = load_file(config.run_dir / "rungs" / "4" / "pytorch_lora_weights.safetensors")
    assert all("fake_score" not in name for name in weights)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
