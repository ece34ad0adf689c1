import pytest

from eval.random_teacher import build
from tests.faults.small_run import copy_of, make_run, outcome_of, small_config


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The folder of a tiny SD1.5 with random weights, which tests must not change."""
    folder = tmp_path_factory.mktemp("whole") / "teacher"
    build("sd15", tiny=True).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def options(tmp_path):
    """Overrides for a run with prompts only, whose teacher is a folder inside the test's folder."""
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
def whole_run(made_once):
    """The config of a finished run, which tests must not change."""
    return small_config(made_once("whole-run", make_run))


@pytest.fixture
def copy(whole_run, tmp_path):
    """The config of a copy of the finished run, which a test may damage."""
    return copy_of(whole_run, tmp_path)


@pytest.fixture
def run_command(capsys, caplog):
    """A function that runs a command as the command line does and returns its Outcome."""
    return lambda command: outcome_of(command, capsys, caplog)
