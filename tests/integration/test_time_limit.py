"""training.max_minutes counts what a command does before training."""

import json
import time

import pytest

from stepdistill import stages
from stepdistill.cli import app, guarded
from stepdistill.config.load import setting_text
from stepdistill.config.saved import resolved
from stepdistill.data import prepare as preparing
from stepdistill.run.log import read_log
from tests.faults.small_run import small_config

pytestmark = pytest.mark.slow
SECONDS = 12.0
"""The limit, in which this small model is loaded and trained for more than one update, also on a busy machine."""
PHASE = {"objective": "mse", "max_train_steps": 400}
LADDER = [{"teacher_steps": 4, "student_steps": 2, "phases": [PHASE]}]


@pytest.fixture
def config(tmp_path):
    limit = f"training.max_minutes={SECONDS / 60}"
    return small_config(tmp_path, f"ladder={json.dumps(LADDER)}", limit)


def updates_of(config):
    return len(read_log(config.run_dir / "log.jsonl"))


def words_of(config):
    """The settings of a config as the command line takes them."""
    return [setting_text(key, value) for key, value in resolved(config).items() if value is not None]


def test_a_long_preparation_uses_up_the_time_of_run(config, monkeypatch, capsys):
    fill = preparing.prepare

    def prepare_for_long(config):
        made = fill(config)
        time.sleep(SECONDS)
        return made

    monkeypatch.setattr(preparing, "prepare", prepare_for_long)
    assert guarded(lambda: app(["run", "letters", *words_of(config)])) == 75
    assert "stopped (training.max_minutes is used) after update 1 of 400" in capsys.readouterr().err
    assert updates_of(config) == 1


def test_the_time_of_a_call_from_python_counts_from_the_call(config, monkeypatch, capsys):
    stages.prepare(config)
    time.sleep(SECONDS)
    assert guarded(lambda: stages.distill(config)) == 75
    made = updates_of(config)
    assert made > 1
    assert guarded(lambda: stages.distill(config, began=time.monotonic() - SECONDS)) == 75
    assert f"stopped (training.max_minutes is used) after update {made + 1} of 400" in capsys.readouterr().err
