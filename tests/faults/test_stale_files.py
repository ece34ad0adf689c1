"""Half-written files of a killed process: the next start is not disturbed by them and removes them, and nothing else."""

import json
import os
import subprocess
import sys
import time

import pytest

from stepdistill import stages
from stepdistill.config import ConfigError, Evaluation
from stepdistill.config.load import load_config
from stepdistill.disk.places import clear_half_written, half_written
from stepdistill.run.lock import locked
from stepdistill.stages import open_run
from tests.integration.conftest import tiny_config

# Starts a run and kills the process after the run's first file is written under its temporary name, before it is renamed.
KILLED = """
import os, sys
os.fsync = lambda _: os._exit(9)
from stepdistill.config.load import load_config
from stepdistill.stages import open_run
open_run(load_config("configs/letters.yaml", sys.argv[1:]))
"""


def aged(path):
    """Makes a file look as if it was written by a process that stopped a minute ago."""
    then = time.time() - 60
    os.utime(path, (then, then))
    return path


def half(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return aged(path)


def test_a_start_killed_before_its_first_file_does_not_block_the_next_start(tmp_path):
    places = f"output_dir={tmp_path}"
    dead = subprocess.run([sys.executable, "-c", KILLED, places], check=False)
    assert dead.returncode == 9
    (leftover,) = (tmp_path / "letters").iterdir()
    assert half_written(leftover) == "config.yaml"
    config = load_config("configs/letters.yaml", [places])
    leftover.touch()
    open_run(config)
    assert leftover.exists(), "a recent file could belong to another process"
    with locked(config.run_dir):
        open_run(config)
    assert [path.name for path in config.run_dir.iterdir()] == ["config.yaml"]


def test_a_file_from_before_the_clock_was_set_back_does_not_stay_for_ever(tmp_path):
    path = half(tmp_path / ".config.yaml.8.partial")
    later = time.time() + 3600
    os.utime(path, (later, later))
    clear_half_written(tmp_path, names=["config.yaml"])
    assert not path.exists()


def test_a_folder_with_the_users_files_is_still_refused(tmp_path):
    half(tmp_path / "letters" / ".config.yaml.7.partial")
    half(tmp_path / "letters" / ".notes.txt.partial")
    with pytest.raises(ConfigError, match="holds files that are no run's"):
        open_run(load_config("configs/letters.yaml", [f"output_dir={tmp_path}"]))
    assert len(list((tmp_path / "letters").iterdir())) == 2


def test_a_file_that_another_process_may_be_writing_stays(tmp_path):
    new = tmp_path / ".config.yaml.7.partial"
    new.write_text("half")
    half(tmp_path / ".config.yaml.8.partial")
    half(tmp_path / ".other.json.8.partial")
    clear_half_written(tmp_path, names=["config.yaml"])
    assert {path.name for path in tmp_path.iterdir()} == {new.name, ".other.json.8.partial"}


@pytest.mark.parametrize(
    ("name", "is_half"),
    [
        (".config.yaml.123.partial", "config.yaml"),
        (".letters_4step_lora.safetensors.partial", "letters_4step_lora.safetensors"),
        (".8.partial/", "8"),
        (".fused.partial/", "fused"),
        (".notes.partial", None),
        ("notes.123.partial", None),
        (".config.yaml.123.partial.txt", None),
        (".partial", None),
        ("partial/", None),
    ],
)
def test_half_written_files_are_recognised_by_name(name, is_half, tmp_path):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    assert half_written(path) == is_half


NOTHING_ELSE = {
    "floor": False,
    "diversity_prompts": 0,
    "lora_scales": (),
    "matrix": False,
    "cost_batch_sizes": (),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """One rung of one update on a few letters."""
    phase = {"objective": "mse", "max_train_steps": 1}
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": [phase]}]
    config = tiny_config(
        tmp_path_factory.mktemp("small"), f"ladder={json.dumps(ladder)}", "data.num_images=8"
    )
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)
    return config.model_copy(
        update={"evaluation": Evaluation(num_images=8, teacher_steps=(4,), **NOTHING_ELSE)}
    )


STALE = {
    "prepare": [
        ".environment.json.7.partial",
        "cache/.manifest.json.7.partial",
        "cache/shards/.00000.safetensors.7.partial",
    ],
    "distill": [".teacher.json.7.partial", "rungs/.2.partial/previews/x.png", "rungs/.2.partial/rung.json"],
    "export": [
        "rungs/4/.README.md.7.partial",
        "rungs/4/.fused.partial/unet/config.json",
        "rungs/4/kohya/.letters_4step_lora.safetensors.partial",
    ],
    "evaluate": [
        "evaluation/.results.json.7.partial",
        "evaluation/student-4/.manifest.json.7.partial",
        "evaluation/student-4/images/.000000.png.7.partial",
    ],
    "report": ["report/.index.html.7.partial"],
}
OF_THE_USER = ["rungs/.notes.partial", "rungs/4/mine.7.partial", "cache/.hidden", "report/.mine.7.partial"]


@pytest.mark.parametrize("stage", STALE)
@pytest.mark.slow_after_first
def test_the_next_start_of_a_stage_removes_only_its_half_written_files(stage, small_run):
    run_dir = small_run.run_dir
    getattr(stages, stage)(small_run)
    before = {path for path in run_dir.rglob("*") if path.is_file()}
    before |= {half(run_dir / name) for name in OF_THE_USER}
    for name in STALE[stage]:
        half(run_dir / name)
    getattr(stages, stage)(small_run)
    assert {path for path in run_dir.rglob("*") if path.is_file()} == before
