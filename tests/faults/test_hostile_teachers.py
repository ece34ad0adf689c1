"""Hostile or broken teachers: `doctor` and `prepare` refuse each in one line with exit code 2, within seconds and with
little memory. Nothing is trained, and no code from the teacher's folder is run."""

import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest

from tests.faults.bounds import command, one_line, problems
from tests.faults.hostile_folders import FOLDERS


def test_the_unchanged_folder_is_accepted(tiny_teacher, tmp_path, options, capsys):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    code, out, _ = command(capsys, "doctor", *options)
    assert code == 0, out
    assert "ok       teacher: " in out


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_one_line_before_anything_is_trained(
    name, tiny_teacher, tmp_path, options, capsys
):
    change, says = FOLDERS[name]
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    change(tmp_path / "teacher")
    code, out, error = command(capsys, "doctor", *options)
    assert code == 2, out
    assert any(re.search(says, line) for line in problems(out)), out
    assert "problem" in one_line(error)
    code, _, error = command(capsys, "prepare", *options)
    assert code == 2
    assert re.search(says, one_line(error)), error
    assert not (tmp_path / "runs" / "letters" / "cache").exists()


@pytest.mark.parametrize(
    "name", ["an infinite weight of the VAE", "a billion timesteps", "a part of the system"]
)
def test_a_hostile_repository_in_the_hub_cache_is_refused_too(
    name, tiny_teacher, tmp_path, options, capsys, monkeypatch
):
    change, says = FOLDERS[name]
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_teacher, snapshot)
    change(snapshot)
    (tmp_path / "hub" / "models--someone--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--model" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    code, out, error = command(capsys, "doctor", *options, "teacher.path=someone/model")
    assert code == 2, out
    assert any(re.search(says, line) for line in problems(out)), out
    assert "1 problem" in one_line(error)


UNETS = [
    *(
        "weights cut short",
        "a pipe as weights",
        "a tensor of the U-Net is missing",
        "a weight that is not a number",
    ),
    *("a billion layers", "an unknown block", "a config that is not JSON"),
]


@pytest.mark.parametrize("name", UNETS)
def test_extract_refuses_broken_folders(name, tiny_teacher, tmp_path, capsys):
    change, _ = FOLDERS[name]
    shutil.copytree(tiny_teacher, tmp_path / "tuned")
    change(tmp_path / "tuned")
    code, _, error = command(
        capsys, "extract", tiny_teacher, tmp_path / "tuned", "--output", tmp_path / "lora"
    )
    assert code == 2
    assert f"extract: cannot load {tmp_path / 'tuned' / 'unet'}: " in one_line(error)
    assert not (tmp_path / "lora").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from stepdistill.cli import main
main()
"""


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("prepare", "a billion layers"),
        ("prepare", "an endless device as weights"),
        pytest.param("doctor", "channels of a million", marks=pytest.mark.slow),
        pytest.param("doctor", "many thousand layers", marks=pytest.mark.slow),
        pytest.param("doctor", "a text encoder of a billion layers", marks=pytest.mark.slow),
    ],
)
def test_a_hostile_folder_is_refused_within_little_memory_and_time(
    stage, name, tiny_teacher, tmp_path, options
):
    change, says = FOLDERS[name]
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    change(tmp_path / "teacher")
    words = [sys.executable, "-c", LIMITED, stage, *options]
    completed = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert completed.returncode == 2, completed.stderr
    assert re.search(says, completed.stdout + completed.stderr)
    one_line(completed.stderr)
