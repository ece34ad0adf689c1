"""Rungs of two runs are merged, drawn with in plain diffusers, and trained on; merged files say nothing of the data."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from stepdistill import stages
from stepdistill.cli import app, guarded
from stepdistill.models.lora_file import read_lora
from stepdistill.models.shared_network import STUDENT
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, rung_folder
from stepdistill.teacher.folder import embedded_folder
from tests.integration.conftest import tiny_config
from tests.integration.exported import random_student

PHASE = {"objective": "mse", "max_train_steps": 2}
DRAW = """
import sys
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

teacher, folder, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
pipeline.load_lora_weights(folder)
pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
generator = torch.Generator().manual_seed(0)
options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "height": 32, "width": 32}
torch.save(pipeline("a red letter a", generator=generator, **options).images, output)
"""


def site(folder, name, seed, *overrides, init=None):
    rungs = [
        {"teacher_steps": 8, "student_steps": 4, "phases": [PHASE]},
        {"teacher_steps": 4, "student_steps": 2, "phases": [PHASE]},
    ]
    if init is not None:
        rungs[0]["init"] = str(init)
    options = [f"name={name}", f"seed={seed}", "lora.rank=4", f"ladder={json.dumps(rungs)}", *overrides]
    return tiny_config(folder, *options)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """(the configs of two trained runs, the folder of their merged rungs)."""
    place = tmp_path_factory.mktemp("sites")
    configs = [site(place / "runs", name, seed) for seed, name in enumerate(["north", "south"])]
    for config in configs:
        stages.prepare(config)
        stages.distill(config)
        stages.export(config)
    stages.merge([config.run_dir for config in configs], output=place / "round1")
    return configs, place / "round1"


@pytest.mark.slow
def test_a_merged_rung_draws_in_plain_diffusers(merged, tmp_path):
    """In fresh processes; what it draws lies between what its two sources draw."""
    configs, place = merged
    output, teacher = tmp_path / "latents.pt", str(embedded_folder("teacher"))
    images = []
    for run_dir in (place, *(config.run_dir for config in configs)):
        arguments = [sys.executable, "-c", DRAW, teacher, str(rung_folder(run_dir, 4)), str(output)]
        completed = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr[-2000:]
        images.append(torch.load(output))
    drawn, first, second = images
    apart = (first - second).norm()
    assert 0 < (drawn - first).norm() < apart
    assert 0 < (drawn - second).norm() < apart


@pytest.mark.slow
def test_a_merged_rung_says_nothing_about_the_data(merged):
    """Its bytes hold no caption and no path, neither of the runs nor of the data."""
    configs, place = merged
    captions = [line.encode() for line in configs[0].preview.prompts]
    paths = [str(config.run_dir).encode() for config in configs]
    for file in rung_folder(place, 4).rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [
                text for text in (*captions, *paths, b"letter", b"north", b"south") if text in content
            ], file


@pytest.mark.slow
def test_a_rung_begins_with_a_merged_one(merged, tmp_path):
    """With a learning rate of nearly 0 it stays that; killed and started again, it has equal bits."""
    _, place = merged
    rates = [f"ladder.{index}.phases.0.learning_rate=1e-12" for index in (0, 1)]
    config = site(tmp_path, "second", 0, *rates, init=rung_folder(place, 4))
    stages.prepare(config)
    stages.distill(config)
    trained, start = (read_lora(folder) for folder in (rung_folder(config.run_dir, 4), rung_folder(place, 4)))
    for name, layer in start.layers.items():
        assert torch.allclose(trained.layers[name].delta(), layer.delta(), atol=1e-5)
    record = RungRecord.read(rung_folder(config.run_dir, 4))
    assert record.teacher_sha256 == RungRecord.read(rung_folder(place, 4)).sha256
    weights = (rung_folder(config.run_dir, 4) / WEIGHT_NAME).read_bytes()
    stages.distill(config)  # nothing is left to train
    assert (rung_folder(config.run_dir, 4) / WEIGHT_NAME).read_bytes() == weights


@pytest.mark.slow
def test_a_rung_is_trained_again_if_its_beginning_was_changed(merged, tmp_path, caplog):
    _, place = merged
    start = tmp_path / "start"
    shutil.copytree(rung_folder(place, 4), start)
    config = site(tmp_path / "runs", "again", 0, init=start)
    stages.prepare(config)
    stages.distill(config)
    before = RungRecord.read(rung_folder(config.run_dir, 4)).sha256
    shutil.rmtree(start)
    stages.distill(config)
    assert (
        RungRecord.read(rung_folder(config.run_dir, 4)).sha256 == before
    )  # what it began with is no longer needed
    shutil.copytree(rung_folder(place, 2), start)
    record = RungRecord.read(start)
    record.__class__(**{**vars(record), "student_steps": 4}).write(start)
    stages.distill(config)
    assert "the 4-step rung began with another LoRA than init names now: it is trained again" in caplog.text
    assert RungRecord.read(rung_folder(config.run_dir, 4)).sha256 != before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("absent", "ladder.0.init: got '{init}', but there is no file {init}; allowed: a rung's folder"),
        (
            "rank",
            "ladder.0.init: got '{init}', a LoRA of rank 2; allowed: 4, the lora.rank; fix: stepdistill merge",
        ),
        ("base", "ladder.0.init: got '{init}', a rung with base_fingerprint other; allowed: one with "),
        (
            "prediction",
            "ladder.0.init: got '{init}', a rung with prediction_type sample; allowed: one with epsilon",
        ),
        ("layers", "ladder.0.init: got '{init}', a LoRA on other layers: "),
    ],
)
def test_a_beginning_that_does_not_fit_is_refused(tmp_path, capsys, change, expected):
    from stepdistill.disk.durable import sha256_file
    from stepdistill.models.lora_file import write_lora
    from stepdistill.teacher.loading import fingerprint

    teacher, init = embedded_folder("teacher"), tmp_path / "init"
    if change != "absent":
        init.mkdir()
        network = random_student(teacher, rank=2 if change == "rank" else 4)
        state = network.adapter_state(STUDENT)
        if change == "layers":
            state = {name: tensor for name, tensor in state.items() if "mid_block" not in name}
        write_lora(init, state, {"r": 2 if change == "rank" else 4})
        base = "other" if change == "base" else fingerprint(teacher)
        kind = "sample" if change == "prediction" else "epsilon"
        rank = 2 if change == "rank" else 4
        RungRecord(4, 8, kind, rank, base, sha256_file(init / WEIGHT_NAME)).write(init)
    config = site(tmp_path / "runs", "refused", 0, init=init)
    assert guarded(lambda: stages.run_all(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected.format(init=init) in error
    assert not (tmp_path / "runs").exists()


def test_merge_by_its_command(tmp_path, capsys):
    arguments = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]
    assert guarded(lambda: app(arguments)) == 2
    assert f"merge: got {tmp_path / 'a'}, which does not exist" in capsys.readouterr().err
    assert guarded(lambda: app([*arguments, "--weights", "1;2"])) == 2
    assert "--weights: got '1;2'; allowed: numbers with commas, such as 3,1" in capsys.readouterr().err
