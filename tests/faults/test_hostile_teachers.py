"""Teachers that are hostile or broken: each is one line and exit code 2, by `doctor` and by `prepare`, within seconds and
without memory; nothing is trained and no code of theirs is run."""

import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest

from tests.faults.bounds import command, one_line, problems
from tests.faults.hostile_folders import FOLDERS


def test_the_folder_that_the_others_are_made_of_is_whole(whole, tmp_path, options, capsys):
    shutil.copytree(whole, tmp_path / "teacher")
    code, out, _ = command(capsys, "doctor", *options)
    assert code == 0, out
    assert "ok       teacher: " in out


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_one_line_before_anything_is_trained(name, whole, tmp_path, options, capsys):
    change, says = FOLDERS[name]
    shutil.copytree(whole, tmp_path / "teacher")
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
def test_a_repository_in_the_hub_s_cache_is_looked_at_as_well(
    name, whole, tmp_path, options, capsys, monkeypatch
):
    change, says = FOLDERS[name]
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "0123abcd"
    shutil.copytree(whole, snapshot)
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
        "a weight that is no number",
    ),
    *("a billion layers", "an unknown block", "a config that is no JSON"),
]


@pytest.mark.parametrize("name", UNETS)
def test_a_lora_is_extracted_from_no_broken_folder(name, whole, tmp_path, capsys):
    change, _ = FOLDERS[name]
    shutil.copytree(whole, tmp_path / "tuned")
    change(tmp_path / "tuned")
    code, _, error = command(capsys, "extract", whole, tmp_path / "tuned", "--output", tmp_path / "lora")
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
def test_a_process_of_little_memory_and_time_is_enough_to_refuse_a_folder(
    stage, name, whole, tmp_path, options
):
    change, says = FOLDERS[name]
    shutil.copytree(whole, tmp_path / "teacher")
    change(tmp_path / "teacher")
    words = [sys.executable, "-c", LIMITED, stage, *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 2, done.stderr
    assert re.search(says, done.stdout + done.stderr)
    one_line(done.stderr)
