"""Teachers that are hostile or broken: each is one line and exit code 2, by `doctor` and by `prepare`, within seconds and
without memory; nothing is trained and no code of theirs is run."""

import re
import shutil

import pytest

from eval.random_teacher import build
from tests.faults.bounds import command, one_line
from tests.faults.hostile_folders import FOLDERS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny SD1.5 of random weights."""
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    build("sd15", tiny=True).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def options(tmp_path):
    """Of a run whose teacher is at `teacher` in the test's folder."""
    (tmp_path / "prompts.txt").write_text("a thing\n")
    return (
        "configs/letters.yaml",
        f"output_dir={tmp_path / 'runs'}",
        f"data.source={tmp_path / 'prompts.txt'}",
        "data.num_images=2",
        "evaluation.resize=torchmetrics",
        f"teacher.path={tmp_path / 'teacher'}",
    )


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
    said = out.replace("\n         mend: ", "; allowed: ").splitlines()
    problems = [line for line in said if line.startswith("problem ")]
    assert code == 2, out
    assert any(re.search(says, line) for line in problems), out
    assert "problem" in one_line(error)
    code, _, error = command(capsys, "prepare", *options)
    assert code == 2
    assert re.search(says, one_line(error)), error
    assert not (tmp_path / "runs" / "letters" / "cache").exists()
