"""A teacher that is not the one that a run was started with: every later stage refuses it and names the changed part."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed
from stepdistill.doctor.findings import examine
from stepdistill.run.rungs import RungRecord, rung_folder
from stepdistill.stages import open_run
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.loading import fingerprint
from stepdistill.teacher.same_teacher import PARTS_RECORD, check_same_teacher, record_teacher
from tests.faults.hostile_folders import SCHEDULER, TEXT, UNET, VAE, edited, retyped
from tests.faults.small_run import small_config


def other_words(folder):
    """Two words of the tokenizer change places."""
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    path.write_text(json.dumps(content))


def one_number(state):
    next(iter(state.values())).view(-1)[0] += 1
    return state


# how the teacher is changed -> the part that the message must name
CHANGES = {
    "weights of the U-Net": (retyped(UNET, one_number), "the weights in unet/"),
    "weights of the VAE": (retyped(VAE, one_number), "the weights in vae/"),
    "weights of the text encoder": (retyped(TEXT, one_number), "the weights in text_encoder/"),
    "betas": (edited(SCHEDULER, beta_end=0.02), "the config scheduler/scheduler_config.json"),
    "the VAE's scale": (edited("vae/config.json", scaling_factor=0.5), "the config vae/config.json"),
    "the U-Net's config": (edited("unet/config.json", flip_sin_to_cos=False), "the config unet/config.json"),
    "the tokenizer": (other_words, "the tokenizer (tokenizer/)"),
    "zeros for no prompt": (
        edited("model_index.json", force_zeros_for_empty_prompt=True),
        "the pipeline (model_index.json)",
    ),
}


@pytest.fixture
def started(tmp_path):
    """(config, teacher's folder) of a run that was started and whose teacher may be changed."""
    teacher = shutil.copytree(embedded_folder("teacher"), tmp_path / "teacher")
    config = small_config(tmp_path / "runs", f"teacher.path={teacher}")
    open_run(config)
    record_teacher(config, teacher)
    return config, teacher


STAGES = (stages.prepare, stages.distill, stages.export, stages.evaluate)


@pytest.mark.parametrize("name", CHANGES)
def test_every_stage_refuses_a_teacher_that_changed_since_the_run_was_started(name, started, run_command):
    config, teacher = started
    change, part = CHANGES[name]
    change(teacher)
    for stage in STAGES:
        outcome = run_command(lambda stage=stage: stage(config))
        assert outcome.code == 2
        (line,) = outcome.errors
        assert f"teacher.path: {part} of '{teacher}' changed since {config.run_dir} was started" in line
        assert "another name=..." in line
    assert not (config.run_dir / "cache").exists()
    assert [f for f in examine(config) if f.state == "problem" and part in f.about]


def test_a_teacher_that_was_saved_again_or_moved_is_the_same(started, tmp_path):
    config, teacher = started
    edited("unet/config.json", _diffusers_version="99.0", _name_or_path="elsewhere")(teacher)
    (teacher / "README.md").write_text("other words")
    check_same_teacher(config, teacher)
    shutil.move(teacher, tmp_path / "moved")
    check_same_teacher(config, tmp_path / "moved")


def test_prepare_records_the_teacher(tmp_path):
    config = small_config(tmp_path)
    stages.prepare(config)
    parts = read_sealed(config.run_dir / PARTS_RECORD)["parts"]
    assert len(parts) == 9
    assert parts["the weights in unet/"] == fingerprint(embedded_folder("teacher"))


def with_rung(config, base_fingerprint):
    RungRecord(2, 4, "epsilon", 32, base_fingerprint, "0" * 64).write(rung_folder(config.run_dir, 2))


def test_a_run_of_an_earlier_version_gets_a_record_if_its_rungs_belong_to_the_teacher(started):
    config, teacher = started
    (config.run_dir / PARTS_RECORD).unlink()
    with_rung(config, fingerprint(teacher))
    check_same_teacher(config, teacher)
    record_teacher(config, teacher)
    assert (config.run_dir / PARTS_RECORD).is_file()


def test_a_rung_of_another_base_model_is_refused_without_a_record_too(started, run_command):
    """Else the next rung would be trained on the student of another base model."""
    config, teacher = started
    (config.run_dir / PARTS_RECORD).unlink()
    with_rung(config, fingerprint(teacher))
    retyped(UNET, one_number)(teacher)
    for stage in STAGES:
        outcome = run_command(lambda stage=stage: stage(config))
        assert outcome.code == 2
        assert "are not those that the 2-step rung" in outcome.errors[0]
    assert not (config.run_dir / PARTS_RECORD).exists()


@pytest.mark.parametrize("content", [None, b'{"a": 1}'])
def test_a_damaged_record_is_named_and_written_again(started, run_command, content):
    config, teacher = started
    path = config.run_dir / PARTS_RECORD
    before = path.read_bytes()
    path.write_bytes(before[:100] if content is None else content)
    outcome = run_command(lambda: record_teacher(config, teacher))
    assert f"{path} is missing or not as it was written" in outcome.messages
    assert path.read_bytes() == before


def test_a_file_that_changes_within_one_process_is_read_again(started):
    config, teacher = started
    check_same_teacher(config, teacher)
    state = load_file(teacher / UNET)
    save_file(one_number(state), teacher / UNET, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="the weights in unet/"):
        check_same_teacher(config, teacher)
