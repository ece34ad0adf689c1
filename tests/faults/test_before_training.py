"""Settings that are first used after training: `doctor`, `run` and `distill` refuse what cannot work before the first
update."""

import importlib.util
import json
import shutil
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.disk.durable import write_json
from stepdistill.doctor.findings import examine
from stepdistill.ladder import save_lora
from stepdistill.teacher.folder import embedded_folder
from tests.faults.hostile_folders import SCHEDULER, edited
from tests.faults.small_run import small_config
from tests.integration.exported import random_student


def lora_row(place, **values):
    row = {"name": "theirs", "path": str(place / "lora"), "steps": 4} | values
    return f"evaluation.loras={json.dumps([row])}"


# name -> (overrides, given a folder with a good LoRA in lora/, and the pattern of the message)
SETTINGS = {
    "a scorer that is not there": (
        lambda _: ["evaluation.score_cmd='/nowhere/scorer {images}'"],
        r"evaluation\.score_cmd: cannot run '/nowhere/scorer'",
    ),
    "a scorer that may not be executed": (
        lambda place: [f"evaluation.score_cmd='{place / 'plain.txt'} {{images}}'"],
        r"evaluation\.score_cmd: cannot run .*plain\.txt'",
    ),
    "a scorer's script that is not there": (
        lambda place: [f"evaluation.score_cmd='{sys.executable} {place / 'no.py'} {{images}}'"],
        r"evaluation\.score_cmd: there is no file .*no\.py'",
    ),
    "a scorer's quote that never ends": (
        lambda _: ['evaluation.score_cmd="scorer \'x"'],
        r"evaluation\.score_cmd: cannot read",
    ),
    "a LoRA that is no file": (
        lambda place: [lora_row(place, path=str(place / "nowhere"))],
        r"evaluation\.loras: theirs: got path",
    ),
    "a LoRA of junk": (
        lambda place: [lora_row(place, path=str(place / "junk.safetensors"))],
        r"evaluation\.loras: theirs: .*cannot be read as safetensors",
    ),
    "an unknown scheduler": (
        lambda place: [lora_row(place, scheduler="NoScheduler")],
        r"evaluation\.loras: got scheduler 'NoScheduler'",
    ),
    "an unknown option of a scheduler": (
        lambda place: [lora_row(place, scheduler_options={"spacing": "trailing"})],
        r"theirs: its scheduler cannot sample in 4 steps: DDIMScheduler has no option spacing",
    ),
    "timesteps of another number than the steps": (
        lambda place: [lora_row(place, scheduler="LCMScheduler", timesteps=[999, 499])],
        r"theirs: its scheduler cannot sample in 4 steps: it has 2 timesteps",
    ),
    "timesteps for a scheduler that takes none": (
        lambda place: [lora_row(place, timesteps=[999, 749, 499, 249])],
        r"DDIMScheduler does not accept custom timesteps",
    ),
    "timesteps that rise": (
        lambda place: [lora_row(place, scheduler="LCMScheduler", timesteps=[1, 2, 3, 4])],
        r"theirs: its scheduler cannot sample in 4 steps",
    ),
    "a rank above the trained one": (
        lambda _: ["lora.rank=4", "export.rank=8"],
        r"export\.rank: got 8; allowed: below lora\.rank 4",
    ),
    "kohya's names of SDXL": (
        lambda _: ["export.kohya_names=sgm"],
        r"export\.kohya_names: got sgm for a base that is not SDXL",
    ),
    "a real image that is no image": (
        lambda place: [f"evaluation.real_images={place / 'real'}"],
        r"evaluation\.real_images: cannot read .*3\.png",
    ),
    "moments of another extractor": (
        lambda place: [f"evaluation.reference_stats={place / 'moments.npz'}"],
        r"evaluation\.reference_stats: got .*, moments of 10 features; allowed: 96",
    ),
    "prompts that are not there": (
        lambda place: [f"evaluation.prompts={place / 'none.txt'}"],
        r"evaluation\.prompts",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_lora(random_student(embedded_folder("teacher")), folder / "lora")
    (folder / "junk.safetensors").write_bytes(b"junk" * 100)
    (folder / "plain.txt").write_text("not a program")
    np.savez(folder / "moments.npz", mu=np.zeros(10), sigma=np.eye(10))
    (folder / "real").mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / "real" / f"{number}.png")
    (folder / "real" / "3.png").write_bytes(b"<html>404</html>")
    return folder


def assert_refused_before_training(config, says):
    about = [finding.about for finding in examine(config) if finding.state == "problem"]
    assert len(about) == 1, about
    for stage in (stages.run_all, stages.distill):
        with pytest.raises(ValueError, match=says) as caught:
            stage(config)
        assert "\n" not in str(caught.value)
        assert not (config.run_dir / "cache").exists()
        assert not (config.run_dir / "rungs").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_used_after_training_is_refused_before_it(name, place, tmp_path):
    overrides, says = SETTINGS[name]
    assert_refused_before_training(small_config(tmp_path, *overrides(place)), says)


def test_the_same_settings_without_a_mistake_are_accepted(place, tmp_path):
    (place / "yes.py").write_text("")
    good = [
        f"evaluation.score_cmd='{sys.executable} {place / 'yes.py'} {{images}}'",
        lora_row(place, scheduler="LCMScheduler", timesteps=[999, 749, 499, 249]),
        "lora.rank=8",
        "export.rank=4",
    ]
    assert [f for f in examine(small_config(tmp_path, *good)) if f.state == "problem"] == []


def test_timesteps_beyond_those_of_the_teacher_are_refused(place, tmp_path):
    """The scheduler of the row is built from the teacher's, which has 500 timesteps."""
    teacher = shutil.copytree(embedded_folder("teacher"), tmp_path / "teacher")
    edited(SCHEDULER, num_train_timesteps=500)(teacher)
    row = lora_row(place, scheduler="LCMScheduler", timesteps=[999, 749, 499, 249])
    for overrides, says in (
        ([row], r"theirs: its scheduler cannot sample in 4 steps"),
        (["evaluation.teacher_steps=[501]"], r"evaluation\.teacher_steps\.0: got 501; allowed: 1 to 500"),
    ):
        config = small_config(tmp_path / "runs", f"teacher.path={teacher}", *overrides)
        assert [f for f in examine(config) if f.state == "problem"]
        for stage in (stages.run_all, stages.distill):
            with pytest.raises(ConfigError, match=says):
                stage(config)
        assert not (config.run_dir / "rungs").exists()


def test_onnx_without_its_packages_is_refused_before_training(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    specs = {
        "onnx": ModuleSpec("onnx", None),
        "onnxscript": None,
        "onnxruntime": ModuleSpec("onnxruntime", None),
    }
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: specs[name] if name in specs else find(name)
    )
    config = small_config(tmp_path, "export.formats=[onnx]")
    assert_refused_before_training(config, r"export\.formats: got onnx, which needs onnxscript; fix: ")


@pytest.mark.parametrize("part", ["safety_checker", "feature_extractor"])
def test_a_part_that_the_index_names_and_the_folder_lacks_is_refused(part, tmp_path, run_command):
    """diffusers could not load such a pipeline."""
    teacher = shutil.copytree(embedded_folder("teacher"), tmp_path / "teacher")
    edited("model_index.json", **{part: ["transformers", "CLIPImageProcessor"]})(teacher)
    config = small_config(tmp_path / "runs", f"teacher.path={teacher}")
    says = rf"lacks {part}/\S+, or {part}: \[null, null\] in model_index\.json"
    assert_refused_before_training(config, says)
    if part == "feature_extractor":
        write_json(teacher / part / "preprocessor_config.json", {})
        assert [f for f in examine(config) if f.state == "problem"] == []


def test_long_prompts_of_previews_are_noted(tmp_path):
    config = small_config(tmp_path, f"preview.prompts={json.dumps(['word ' * 80])}")
    (note,) = [f for f in examine(config) if f.about.startswith("preview: ")]
    assert (note.state, note.remedy) == ("note", "shorter preview.prompts")
    assert "prompts of up to 80 words" in note.about
