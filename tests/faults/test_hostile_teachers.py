"""Teachers that are hostile or broken: each is one line and exit code 2, by `doctor` and by `prepare`, within seconds and
without memory; nothing is trained and no code of theirs is run."""

import re
import shutil

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
