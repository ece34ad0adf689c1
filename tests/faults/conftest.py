import pytest

from eval.random_teacher import build
from tests.faults.small_run import answer, copy_of, make_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A tiny SD1.5 of random weights; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    build("sd15", tiny=True).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def options(tmp_path):
    """Of a run on a teacher in the test's folder, of prompts alone."""
    (tmp_path / "prompts.txt").write_text("a thing\n")
    return (
        "configs/letters.yaml",
        f"output_dir={tmp_path / 'runs'}",
        f"data.source={tmp_path / 'prompts.txt'}",
        "data.num_images=2",
        "evaluation.resize=torchmetrics",
        f"teacher.path={tmp_path / 'teacher'}",
    )


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The config of a finished run, nothing of which a test may change."""
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole_run, tmp_path):
    """The config of a copy of it, to be damaged."""
    return copy_of(whole_run, tmp_path)


@pytest.fixture
def asked(capsys, caplog):
    """What a command comes to, as the command line runs it."""
    return lambda command: answer(command, capsys, caplog)
