"""A run that starts from another run's rung: fitting rungs are copied, others refused before anything is trained."""

import dataclasses
import json

import pytest

from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.disk.durable import sha256_file, write_json
from stepdistill.plan import describe, training_forwards
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, rung_folder
from stepdistill.run.settings import config_hash
from stepdistill.run.start_from import TAKEN, rungs_to_take, taken_from, taken_steps
from stepdistill.stages import check_run, open_run


def rung_of(run_dir, student, teacher, **changed):
    """A finished rung on disk whose LoRA is a few bytes."""
    folder = rung_folder(run_dir, student)
    folder.mkdir(parents=True)
    (folder / WEIGHT_NAME).write_bytes(b"weights")
    digest = sha256_file(folder / WEIGHT_NAME)
    record = RungRecord(student, teacher, "epsilon", 32, "base", digest, 1.0)
    dataclasses.replace(record, **changed).write(folder)
    return folder


def forked(tmp_path, start, *overrides):
    options = [f"output_dir={tmp_path / 'runs'}", "name=other", f"start_from={start}"]
    return load_config("configs/letters.yaml", [*options, *overrides])


@pytest.fixture
def first(tmp_path):
    run_dir = tmp_path / "first"
    rung_of(run_dir, 32, 32)
    rung_of(run_dir, 8, 32)
    return run_dir


def test_the_rung_and_those_before_it_are_copied(tmp_path, first):
    config = forked(tmp_path, rung_folder(first, 8))
    check_run(config)
    assert [
        taken.record.student_steps for taken in rungs_to_take(config, base_prediction_type="epsilon")
    ] == [32, 8]
    assert taken_steps(config) == [32, 8]
    lines = describe(config, stages=["distill"]).splitlines()
    assert lines[1] == f"distill    32 -> 32  taken over from {rung_folder(first, 8)}"
    assert lines[3].startswith("distill    8 -> 4  mse")
    alone = load_config("configs/letters.yaml")
    assert training_forwards(config) == training_forwards(alone, finished=[32, 8])
    assert config_hash(config) != config_hash(alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_rank": 8}, r"lora\.rank: got 32, but the rung in .*8 has 8"),
        ({"teacher_steps": 16}, r"ladder\.1\.teacher_steps: got 32, but .* has 16"),
        (
            {"prediction_type": "sample"},
            r"ladder\.1\.prediction_type: got epsilon, but .* has sample",
        ),
        ({"start_timestep": 499}, r"ladder\.1\.start_timestep: got None, but .* has 499"),
        (
            {"student_steps": 16},
            r"a rung of 16 steps; allowed: one of this ladder's: 32, 8, 4, 2, 1",
        ),
    ],
)
def test_a_rung_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, changed, message):
    run_dir = tmp_path / "first"
    rung_of(run_dir, 32, 32)
    folder = rung_of(run_dir, 8, 32, **changed)
    with pytest.raises(ConfigError, match=message) as caught:
        check_run(forked(tmp_path, folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_not_a_rung_and_missing_earlier_rungs_are_named(tmp_path, first):
    with pytest.raises(
        ConfigError, match=r"start_from: got '.*first', which is not a finished rung; allowed: a rung's"
    ):
        check_run(forked(tmp_path, first))
    lone = tmp_path / "lone" / "8"
    lone.parent.mkdir()
    rung_folder(first, 8).rename(lone)
    with pytest.raises(ConfigError, match=r"32, which this ladder has before it, .* begins with 32 -> 8"):
        check_run(forked(tmp_path, lone))


def test_a_run_with_copied_rungs_resumes_when_the_other_run_is_gone(tmp_path, first):
    config = forked(tmp_path, rung_folder(first, 32))
    open_run(config)
    rung_folder(config.run_dir, 32).parent.mkdir(parents=True)
    rung_folder(first, 32).rename(rung_folder(config.run_dir, 32))
    check_run(config)
    assert taken_steps(config) == [32]
    with pytest.raises(
        ConfigError, match=r"start_from: got nothing, but the run in .* was started with start_from=.*/32"
    ):
        check_run(load_config("configs/letters.yaml", [f"output_dir={tmp_path / 'runs'}", "name=other"]))


def test_a_retrained_rung_no_longer_counts_as_copied(tmp_path):
    write_json(tmp_path / TAKEN, {"32": {"from": "runs/first/rungs/32", "sha256": "ab"}})
    assert taken_from(tmp_path, 32, "ab") == "runs/first/rungs/32"
    assert taken_from(tmp_path, 32, "cd") is None
    assert taken_from(tmp_path, 8, "ab") is None
    (tmp_path / TAKEN).write_text(json.dumps([1]))
    assert taken_from(tmp_path, 32, "ab") is None
