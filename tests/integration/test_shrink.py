"""A smaller base model: made, stopped and continued to equal bits, loaded by diffusers alone, climbed on by the ladder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from stepdistill import stages
from stepdistill.cli import guarded
from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.disk.durable import read_sealed
from stepdistill.errors import ToBeContinued
from stepdistill.ladder.shared import load_shared
from stepdistill.models.experts import Experts
from stepdistill.run.log import read_log
from stepdistill.runtime import Runtime
from stepdistill.shrink.train import SENSITIVITY
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.small_base import base_folder, base_record, on_small_base, work_folder
from tests.integration.conftest import SMALL, tiny_config
from tests.integration.test_checkpoint import distill_and_stop
from tests.integration.test_objectives import shortened

SHRINK = ["shrink.remove=[middle]", "shrink.max_train_steps=4", "shrink.learning_rate=1e-3"]


def small_config(folder, *overrides):
    return tiny_config(folder, *SHRINK, *overrides)


def unet_of(config):
    return load_file(base_folder(config) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("shrunk"), "training.ema_decay=0.5")
    stages.prepare(config)
    stages.shrink(config)
    return config


def test_the_smaller_base_is_trained_whole_and_complete(shrunk):
    """All weights but those that were removed are there and moved, and the other parts are the teacher's to the byte."""
    teacher, base = embedded_folder("teacher"), base_folder(shrunk)
    original = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    weights = unet_of(shrunk)
    assert weights.keys() == {name for name in original if not name.startswith("mid_block.")}
    assert {tensor.dtype for tensor in weights.values()} == {tensor.dtype for tensor in original.values()}
    assert all(not torch.equal(tensor, original[name]) for name, tensor in weights.items())
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (teacher / part).iterdir():
            assert (base / part / file.name).read_bytes() == file.read_bytes()
    record = base_record(shrunk)
    assert record["removed"] == ["middle"]
    assert record["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert record["parameters_of_original"] == sum(tensor.numel() for tensor in original.values())
    lines = read_log(work_folder(shrunk) / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"output_loss", "denoise_loss", "l2_loss", "student_grad_norm"} <= lines[0].keys()
    assert not (work_folder(shrunk) / "checkpoints").exists()
    assert list((work_folder(shrunk) / "previews").glob("*-end.png"))


def test_a_finished_one_is_not_made_again(shrunk, caplog):
    before = (base_folder(shrunk) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        stages.shrink(shrunk)
    assert "is there already" in caplog.text
    after = (base_folder(shrunk) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert after == before


@pytest.mark.slow
def test_diffusers_alone_loads_it_in_a_fresh_process(shrunk, tmp_path):
    code = (
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "assert pipeline.unet.mid_block is None\n"
        "image = pipeline('a red letter a on white', num_inference_steps=2, output_type='pt').images\n"
        "assert image.isfinite().all() and not any(name.startswith('stepdistill') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base_folder(shrunk))], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_first_rung_learns_from_the_original_and_the_student_is_the_smaller_one(shrunk):
    shared = load_shared(on_small_base(shrunk), Runtime())
    assert isinstance(shared.undistilled, Experts)
    (member,) = shared.undistilled.members
    assert member.guidance_scale == shrunk.teacher.guidance_scale
    assert member.network.model.mid_block is not None
    assert shared.network.model.mid_block is None
    original = UNet2DConditionModel.from_pretrained(embedded_folder("teacher"), subfolder="unet")
    for name, tensor in original.state_dict().items():
        assert torch.equal(member.network.model.state_dict()[name], tensor.float())


@pytest.mark.slow
def test_stopped_and_continued_it_has_equal_bits(tmp_path, shrunk):
    stopped = small_config(
        tmp_path, "training.ema_decay=0.5", "training.checkpoint={every_minutes: 0, keep: 2}"
    )
    stages.prepare(stopped)
    with pytest.raises(ToBeContinued):
        stages.shrink(stopped.model_copy(update={"training": limited(stopped)}))
    assert base_record(stopped) is None
    assert list((work_folder(stopped) / "checkpoints").iterdir())
    stages.shrink(stopped)
    first, second = unet_of(shrunk), unet_of(stopped)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def limited(config):
    """Training settings that stop after the first update."""
    return config.training.model_copy(update={"max_minutes": 1e-9})


@pytest.mark.slow
def test_the_parts_are_chosen_by_a_table_that_is_kept(tmp_path, capsys, caplog):
    config = tiny_config(
        tmp_path,
        "shrink.keep=0.9",
        "shrink.max_train_steps=1",
        "shrink.sensitivity_samples=10",
        "shrink.objectives=[{kind: output}]",
    )
    stages.prepare(config)
    with caplog.at_level("INFO"):
        stages.shrink(config)
    kept = read_sealed(work_folder(config) / SENSITIVITY)
    assert {entry["part"] for entry in kept["table"]} == {"level.1.decoder.layer.0", "middle.end", "middle"}
    assert all(0 < entry["error"] < 2 for entry in kept["table"])
    assert "| part | parameters | error without it |" in caplog.text
    record = base_record(config)
    assert record["removed"] == kept["removed"]
    assert record["parameters"] <= 0.9 * record["parameters_of_original"]


@pytest.mark.slow
def test_the_shipped_ladder_on_a_smaller_base_goes_through_all_stages_and_resumes_to_equal_bits(
    tmp_path, monkeypatch
):
    overrides = ("shrink.max_train_steps=2", "evaluation.teacher_steps=[4]")
    config = shortened("letters_small", tmp_path / "straight", *overrides)
    stages.run_all(config)
    results = json.loads((config.run_dir / "report" / "results.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    assert {"teacher-4", "smaller-base-4", "student-32", "student-8", "student-1"} <= set(rows)
    assert rows["smaller-base-4"]["latent_mse_to_teacher"] > 0 == rows["teacher-4"]["latent_mse_to_teacher"]
    assert "of the teacher&#39;s, without middle" in (config.run_dir / "report" / "index.html").read_text()
    stopped = shortened("letters_small", tmp_path / "stopped", *overrides)
    stages.prepare(stopped)
    stages.shrink(stopped)
    distill_and_stop(stopped, monkeypatch, after=3)
    stages.distill(stopped)
    for steps in (32, 8, 4, 2, 1):
        files = [
            c.run_dir / "rungs" / str(steps) / "pytorch_lora_weights.safetensors" for c in (config, stopped)
        ]
        first, second = map(load_file, files)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), steps


@pytest.mark.slow
def test_the_ladder_without_its_smaller_base_is_refused(tmp_path, capsys):
    config = small_config(tmp_path)
    stages.prepare(config)
    with pytest.raises(
        ConfigError, match=r"shrink: .*/base is not there, or damaged; fix: `stepdistill shrink`"
    ):
        stages.distill(config)


def test_a_config_without_the_section_and_parts_of_another_network_end_with_code_2(tmp_path, capsys):
    options = [f"output_dir={tmp_path}", *SMALL]

    def code(*overrides):
        config = load_config("configs/letters.yaml", [*options, *overrides])
        return guarded(lambda: stages.shrink(config))

    assert code() == 2
    assert "shrink: got no such section" in capsys.readouterr().err
    config = load_config("configs/letters.yaml", [*options, "shrink.remove=[level.0.pair.1]"])
    for stage in (stages.prepare, stages.shrink, stages.run_all):
        assert guarded(lambda stage=stage: stage(config)) == 2
        assert "got 'level.0.pair.1', which is no part of this U-Net" in capsys.readouterr().err
        assert not config.run_dir.exists()


@pytest.mark.slow
def test_a_lost_base_is_made_again(shrunk, tmp_path):
    config = moved(shrunk, tmp_path)
    shutil.rmtree(base_folder(config))
    with pytest.raises(ConfigError, match=r"base is not there, or damaged; fix: `stepdistill shrink`"):
        stages.distill(config)
    stages.shrink(config)
    first, second = unet_of(shrunk), unet_of(config)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def moved(config, place):
    """A copy of a run."""
    shutil.copytree(config.run_dir, place / config.name)
    return config.model_copy(update={"output_dir": str(place)})


@pytest.mark.slow
def test_the_ladder_climbs_on_a_teacher_of_an_older_diffusers_and_compares_features_with_it(tmp_path):
    """Its unet/config.json lacks keys that diffusers writes today. The first rung's features are the original's, whose
    network is another one."""
    teacher = tmp_path / "teacher"
    shutil.copytree(embedded_folder("teacher"), teacher)
    path = teacher / "unet" / "config.json"
    full = json.loads(path.read_text())
    path.write_text(json.dumps({key: full[key] for key in sorted(full) if full[key] is not None}))
    first = {"objectives": [{"kind": "mse"}, {"kind": "l2", "taps": ["encoder"]}], "max_train_steps": 1}
    rungs = [{"teacher_steps": 8, "student_steps": 4, "phases": [first]}]
    config = small_config(tmp_path, f"teacher.path={teacher}", f"ladder={json.dumps(rungs)}")
    stages.prepare(config)
    stages.shrink(config)
    stages.distill(config)
    (line,) = read_log(config.run_dir / "log.jsonl")
    assert line["l2_loss"] > 0
    assert (config.run_dir / "rungs" / "4" / "pytorch_lora_weights.safetensors").is_file()
