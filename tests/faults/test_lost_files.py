"""What is lost under a run, or cannot be written, costs as little as possible: a removed folder, a damaged rung, a full disk
at the end of a rung."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest
from diffusers import StableDiffusionPipeline

from stepdistill import stages
from stepdistill.data.held_out import settled
from stepdistill.data.prepare import _CacheBuilder
from stepdistill.data.shards import write_shard
from stepdistill.data.size_counts import used_sizes
from stepdistill.disk.durable import read_sealed, write_sealed
from stepdistill.errors import DataError
from stepdistill.evaluation.draw import sampler
from stepdistill.run.log import read_log
from stepdistill.run.rung_order import begun_from
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord
from stepdistill.runtime import Processes
from stepdistill.training import phase as phase_module
from tests.faults.small_run import small_config, tree
from tests.faults.test_damaged_runs import flip


@pytest.fixture
def updates(monkeypatch):
    """Calls to make before an update, by its number from 0 since the test's start; `updates.count` of them were made."""
    hooks = Updates()
    update = phase_module.update

    def counted(*args):
        hooks.pop(hooks.count, lambda: None)()
        hooks.count += 1
        return update(*args)

    monkeypatch.setattr(phase_module, "update", counted)
    return hooks


class Updates(dict):
    count = 0


def weights_of(config):
    return {k: v for k, v in tree(config.run_dir / "rungs").items() if k.endswith(WEIGHT_NAME)}


# the run's folder, the cache


@pytest.mark.parametrize("lost", ["removed", "another run's"])
def test_a_shard_that_is_lost_while_prepare_works_is_named(tmp_path, run_command, lost):
    config, processes = settled(small_config(tmp_path)), Processes()
    stages.open_run(config)
    builder = _CacheBuilder(config, used_sizes(config, processes))
    builder.fill(processes)
    (shard,) = (config.run_dir / "cache" / "shards").glob("*.safetensors")
    shard.unlink()
    if lost == "another run's":
        write_shard(shard, {}, {"key": "another", "bad": "[{}, {}]", "seen": "0"})
    outcome = run_command(builder.finish)
    assert outcome.code == DataError.exit_code
    assert outcome.errors == [
        f"stepdistill: {shard} was removed or replaced after it was written; fix: run the same command again"
    ]
    assert run_command(lambda: stages.prepare(config)).code == 0


@pytest.mark.parametrize(
    "how", ["removed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("renamed", "replaced"))]
)
def test_a_folder_that_is_lost_while_it_trains_stops_the_run_and_does_not_come_back(
    whole_run, copy, run_command, updates, how
):
    shutil.rmtree(copy.run_dir / "rungs")
    elsewhere = copy.run_dir.with_name("elsewhere")

    def lose():
        copy.run_dir.rename(elsewhere)
        if how == "removed":
            shutil.rmtree(elsewhere)
        if how == "replaced":
            copy.run_dir.mkdir()

    updates[0] = lose
    outcome = run_command(lambda: stages.distill(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert (
        f"{copy.run_dir} was removed or renamed while this command worked in it; fix: " in outcome.errors[0]
    )
    assert updates.count == 1
    assert copy.run_dir.exists() == (how == "replaced")
    assert how != "replaced" or list(copy.run_dir.iterdir()) == []
    if how == "renamed":
        elsewhere.rename(copy.run_dir)
        assert run_command(lambda: stages.distill(copy)).code == 0
        assert weights_of(copy) == weights_of(whole_run)
    else:
        assert run_command(lambda: stages.prepare(copy)).code == 0


def test_a_folder_that_is_removed_during_evaluation_does_not_come_back(copy, run_command, monkeypatch):
    shutil.rmtree(copy.run_dir / "evaluation")
    draw = sampler.draw

    def lose(*args, **options):
        shutil.rmtree(copy.run_dir)
        return draw(*args, **options)

    monkeypatch.setattr(sampler, "draw", lose)
    outcome = run_command(lambda: stages.evaluate(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "was removed or renamed" in outcome.errors[0]
    assert not copy.run_dir.exists()


# a rung in the middle of the ladder


@pytest.mark.slow
def test_after_a_damaged_rung_the_later_ones_stay_if_it_comes_out_the_same(whole_run, copy, run_command):
    log, later = read_log(copy.run_dir / "log.jsonl"), copy.run_dir / "rungs" / "1" / WEIGHT_NAME
    stamp = later.stat().st_mtime_ns
    flip(copy.run_dir / "rungs" / "2" / WEIGHT_NAME)
    outcome = run_command(lambda: stages.distill(copy))
    assert outcome.code == 0
    assert (
        "the 2-step rung is damaged: it is trained again; if its LoRA comes out as it was, the rungs of 1 steps stay"
        in outcome.messages
    )
    assert weights_of(copy) == weights_of(whole_run)
    assert later.stat().st_mtime_ns == stamp
    assert sorted(r["rung"] for r in read_log(copy.run_dir / "log.jsonl")) == sorted(r["rung"] for r in log)
    assert run_command(lambda: stages.distill(copy)).messages == ""


def with_record(config, steps, **changes):
    path = config.run_dir / "rungs" / str(steps) / "rung.json"
    record = read_sealed(path) | changes
    write_sealed(path, {key: value for key, value in record.items() if value != "absent"})


@pytest.mark.parametrize("is_damaged", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_rung_that_began_with_another_lora_is_trained_again(
    whole_run, copy, run_command, updates, is_damaged
):
    with_record(copy, 1, teacher_sha256="0" * 64)
    if is_damaged:
        flip(copy.run_dir / "rungs" / "2" / WEIGHT_NAME)
    outcome = run_command(lambda: stages.distill(copy))
    assert outcome.code == 0
    assert (
        "the 1-step rung began with another LoRA than the 2-step rung has now: it is trained again"
        in outcome.messages
    )
    assert updates.count == 1 + is_damaged
    assert weights_of(copy) == weights_of(whole_run)
    record = RungRecord.read(copy.run_dir / "rungs" / "1")
    assert record.teacher_sha256 == RungRecord.read(copy.run_dir / "rungs" / "2").sha256


def test_the_first_rung_begins_with_no_lora_even_if_it_has_as_many_steps_as_its_teacher(tmp_path):
    phases = [{"objective": "mse", "max_train_steps": 1}]
    rungs = [{"teacher_steps": 4, "student_steps": n, "phases": phases} for n in (4, 2)]
    config = small_config(tmp_path, f"ladder={json.dumps(rungs)}")
    folder = config.run_dir / "rungs" / "4"
    folder.mkdir(parents=True)
    RungRecord(4, 4, "epsilon", 4, "base", "1" * 64).write(folder)
    assert [begun_from(config, rung) for rung in config.ladder] == [None, "1" * 64]


@pytest.mark.slow
def test_a_rung_of_an_earlier_version_stays(copy, run_command, updates):
    with_record(copy, 1, teacher_sha256="absent")
    assert "teacher_sha256" not in read_sealed(copy.run_dir / "rungs" / "1" / "rung.json")
    assert run_command(lambda: stages.distill(copy)).messages == ""
    flip(copy.run_dir / "rungs" / "2" / WEIGHT_NAME)
    assert run_command(lambda: stages.distill(copy)).code == 0
    assert updates.count == 1


# a full disk


@pytest.mark.slow
def test_a_full_disk_at_the_end_of_a_rung_costs_no_training(
    whole_run, copy, run_command, updates, monkeypatch
):
    shutil.rmtree(copy.run_dir / "rungs" / "1")
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "save_lora_weights", full)
        outcome = run_command(lambda: stages.distill(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert f"{WEIGHT_NAME}: No space left on device; fix: make room there" in outcome.errors[0]
    assert updates.count == 1
    assert run_command(lambda: stages.distill(copy)).code == 0
    assert updates.count == 1
    assert weights_of(copy) == weights_of(whole_run)
    lines = read_log(copy.run_dir / "log.jsonl")
    assert [line["rung"] for line in lines] == [2, 1]
    assert not list((copy.run_dir / "rungs").rglob("*checkpoints*"))


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("stage", "lost", "purpose"),
    [("distill", "rungs/1", "the 1-step rung"), ("evaluate", "evaluation/student-1", "evaluation")],
)
def test_too_little_room_is_noticed_before_the_work_with_the_missing_bytes(
    copy, run_command, updates, monkeypatch, stage, lost, purpose
):
    shutil.rmtree(copy.run_dir / lost)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: Usage(2**40, 2**40 - 5000, 5000))
        outcome = run_command(lambda: getattr(stages, stage)(copy))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert f"{purpose} needs about " in outcome.errors[0]
    assert "5,000 are free there: " in outcome.errors[0]
    assert "bytes are missing; fix: make room there" in outcome.errors[0]
    assert updates.count == 0
    assert not (copy.run_dir / lost).exists()


def test_a_finished_run_needs_no_room(copy, run_command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2**40, 2**40, 0))
    for stage in (stages.distill, stages.evaluate):
        assert run_command(lambda s=stage: s(copy)).code == 0


# the log


@pytest.mark.parametrize(
    "damage", [b"\xff", *(pytest.param(damage, marks=pytest.mark.slow) for damage in (b"\0", b"{"))]
)
@pytest.mark.slow
def test_a_bad_byte_in_the_log_costs_its_line_alone(copy, run_command, damage):
    shutil.rmtree(copy.run_dir / "rungs" / "1")
    path = copy.run_dir / "log.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + first[:20] + damage + first[21:] + second)
    for command in (lambda: stages.report(copy), lambda: stages.distill(copy)):
        outcome = run_command(command)
        assert outcome.code == 0
        assert f"{path} is missing or not as it was written: 1 of its 3 lines are left out (line 2)" in (
            outcome.messages
        )
    assert [line["rung"] for line in read_log(path)] == [2, 1]


@pytest.mark.slow
def test_a_kill_at_the_start_of_a_rung_keeps_the_lines_of_the_others(copy, updates):
    flip(copy.run_dir / "rungs" / "2" / WEIGHT_NAME)
    path = copy.run_dir / "log.jsonl"

    class Killed(BaseException):
        pass

    def kill():
        assert [line["rung"] for line in read_log(path)] == [1]
        raise Killed

    updates[0] = kill
    with pytest.raises(Killed):
        stages.distill(copy)
    stages.distill(copy)
    assert sorted(line["rung"] for line in read_log(path)) == [1, 2]


# the clock


@pytest.mark.parametrize("now", [0.0, pytest.param(4e9, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_another_time_of_day_changes_nothing(whole_run, copy, run_command, monkeypatch, now):
    shutil.rmtree(copy.run_dir / "rungs" / "1")
    half = copy.run_dir / ".teacher.json.7.partial"
    half.write_bytes(b"half")
    monkeypatch.setattr("time.time", lambda: now)
    assert run_command(lambda: stages.distill(copy)).code == 0
    assert weights_of(copy) == weights_of(whole_run)
    assert not half.exists()
    record = RungRecord.read(copy.run_dir / "rungs" / "1")
    assert 0 <= record.training_seconds < 100
