"""The comparison of peers as a user runs it, on other images than letters and with a tiny budget; then resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
METHODS = ["stepdistill", "lcm-lora", "dmd2-lora"]
FAST = ["evaluation.diversity_prompts=0", "preview.looks_images=0"]


@pytest.fixture
def world(tmp_path):
    """A folder of captioned images that are not letters, and a config that names it."""
    folder = tmp_path / "walls"
    folder.mkdir()
    for k in range(240):
        Image.new("RGB", (48, 40), (k, 255 - k, 90)).save(folder / f"{k:03d}.png")
        (folder / f"{k:03d}.txt").write_text(f"a wall number {k}")
    return folder


@pytest.mark.slow
def test_peers_are_compared_on_any_folder_of_captioned_images(world, tmp_path):
    output = tmp_path / "peers"
    options = ["--seeds", "0", "--budget", "400", "--methods", *METHODS]
    options += ["--output-dir", str(tmp_path / "runs"), "--output", str(output)]
    options += [f"data.source={world}", "training.train_batch_size=2", "evaluation.num_images=8"]
    options += ["evaluation.features=reader", "evaluation.teacher_steps=[8, 4]", *FAST]
    command = [sys.executable, "eval/compare_peers.py", *options]
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads(output.with_suffix(".json").read_text())
    table = results["tables"][0]
    compared = {f"{m}-{n}" for m in [*METHODS, "unguided"] for n in (8, 4, 2, 1)}
    assert set(table) == {"teacher-8", "teacher-4"} | compared
    assert results["environment"]["torch"]
    assert all(row["fid_to_teacher"] >= -1e-6 for row in table.values())
    sheet = Image.open(output.with_suffix(".png"))
    assert sheet.height >= 6 * 64  # teacher 8 and 4, ours 4, 2 and 1, LCM-LoRA 4
    text = output.with_suffix(".md").read_text()
    assert "| FID to teacher | 8 steps | 4 steps | 2 steps | 1 step |" in text
    assert f"{table['lcm-lora-4']['fid_to_real']:.1f}" in text
    assert table["teacher-8"]["paired_fid_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert not {"prompt_accuracy", "second_fid_to_real"} & table["lcm-lora-4"].keys()
    forwards = [cost["unet_forwards"] for cost in results["costs"][0].values()]
    assert max(forwards) <= 1.6 * 400  # a few updates are coarse: DMD2's is 40 forwards of 2 samples
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert json.loads(output.with_suffix(".json").read_text())["table"] == results["table"]


@pytest.mark.slow
def test_letters_are_measured_by_both_readers_at_tuned_rates(tmp_path):
    """Four rates are tried on the same images of the teacher and the best is used; then both readers measure and order."""
    output, runs = tmp_path / "peers", tmp_path / "runs"
    options = ["--seeds", "0", "--budget", "400", "--tune", "--methods", "lcm-lora"]
    options += ["--output-dir", str(runs), "--output", str(output), "data.num_images=40"]
    options += ["training.train_batch_size=2", "evaluation.num_images=8", "evaluation.teacher_steps=[8, 4]"]
    options += FAST
    command = [sys.executable, "eval/compare_peers.py", *options]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    for row in ("teacher-8", "floor"):
        manifests = {file.read_bytes() for file in runs.glob(f"tuning-*/*/evaluation/{row}/manifest.json")}
        assert len(manifests) == 1, "the teacher was drawn again"
    rates = json.loads(output.with_suffix(".rates.json").read_text())
    for name, record in rates.items():
        scores = record["mean_log_fid"]
        best = min(s for s in scores.values() if s is not None)
        assert scores[f"{record['factor']:.2f}"] == best, name
    results = json.loads(output.with_suffix(".json").read_text())
    row = results["tables"][0]["lcm-lora-4"]
    for measure in ("fid_to_real", "fid_to_teacher", "prompt_accuracy"):
        assert isinstance(row[f"second_{measure}"], float)
    assert results["floors"][0]["second_fid_to_real"] > 0
    assert {entry["measure"] for entry in results["orders"]} >= {"fid_to_real", "fid_to_teacher"}
    text = output.with_suffix(".md").read_text()
    assert "| tau between the readers | 8 steps | 4 steps | 2 steps | 1 step |" in text
    assert "second reader's FID to teacher" in text
