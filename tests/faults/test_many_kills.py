"""kill -9 at random moments: the run, started again until it is done, leaves what an uninterrupted one leaves."""

import json
import logging
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from stepdistill import stages
from stepdistill.cli import guarded
from stepdistill.disk.durable import read_sealed
from stepdistill.ladder import train
from stepdistill.run.checkpoint_files import CHECKPOINTS, MANIFEST, STATE
from stepdistill.run.log import read_log
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from tests.integration.conftest import tiny_config

KILLS = int(os.environ.get("STEPDISTILL_TEST_KILLS", "15"))
"""For 200, which take about ten minutes: STEPDISTILL_TEST_KILLS=200."""
MAX_SECONDS = 9 * KILLS + 300
UPDATES = 12
TIMES = ("images_per_second", "data_seconds")
_MSE = {"objective": "mse", "max_train_steps": UPDATES, "learning_rate": 1e-3}
_LADDER = [
    {"teacher_steps": 8, "student_steps": 4, "phases": [_MSE, _MSE | {"objective": "single"}]},
    {"teacher_steps": 4, "student_steps": 2, "phases": [_MSE, _MSE | {"objective": "paired"}]},
]


def config_of(folder):
    words = ("training.checkpoint={every_minutes: 0, keep: 2}", "training.train_batch_size=2")
    return tiny_config(
        folder, f"ladder={json.dumps(_LADDER)}", "training.ema_decay=0.5", "preview.looks_images=0", *words
    )


def distill_in_fork(config, kept):
    """The process id of a forked `stepdistill distill`, which copies a rung's checkpoints into `kept` before its end."""
    child = os.fork()
    if child:
        return child
    finish = train.finish_rung

    def copy_and_finish(shared, rung, partial, **facts):
        half = kept.with_name(f"half-{rung.student_steps}")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(partial / CHECKPOINTS, half)
        shutil.rmtree(kept / str(rung.student_steps), ignore_errors=True)
        half.rename(kept / str(rung.student_steps))
        finish(shared, rung, partial, **facts)

    train.finish_rung = copy_and_finish
    code = 1
    try:
        logging.disable()
        code = guarded(lambda: stages.distill(config))
    finally:
        os._exit(code)


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_at_the_end(kept, steps):
    """(tensors, numbers) after the last update of a rung's last phase: student, D, both optimisers, average."""
    folder = kept / str(steps) / f"phase1-step{UPDATES:06d}"
    manifest = read_sealed(folder / MANIFEST)
    return load_file(folder / STATE), {"state": manifest["state"], "carried": manifest["carried"]}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key != "seconds"}
    return value


def log_of(config):
    lines = read_log(config.run_dir / "log.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(run, kept, straight, kept_straight):
    assert log_of(run) == log_of(straight)
    for steps in (4, 2):
        weights, expected = (
            (rung_folder(c.run_dir, steps) / WEIGHT_NAME).read_bytes() for c in (run, straight)
        )
        assert weights == expected
        (tensors, numbers), (others, other_numbers) = (
            state_at_the_end(k, steps) for k in (kept, kept_straight)
        )
        assert without_times(numbers) == without_times(other_numbers)
        assert tensors.keys() == others.keys()
        assert any("optimizers/discriminator" in name for name in tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    assert list(run.run_dir.rglob(".*")) == []


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_with_equal_weights_optimisers_and_log(tmp_path):
    straight = config_of(tmp_path / "straight")
    stages.prepare(straight)
    kept_straight = tmp_path / "kept-straight"
    kept_straight.mkdir()
    pristine = tmp_path / "pristine"
    shutil.copytree(straight.run_dir, pristine)
    started = time.monotonic()
    assert end_of(distill_in_fork(straight, kept_straight)) == 0
    whole = time.monotonic() - started
    moments, kills, runs = random.Random(5), 0, 0
    deadline = time.monotonic() + MAX_SECONDS
    while kills < KILLS:
        run, kept = config_of(tmp_path / "killed"), tmp_path / "kept"
        for folder in (run.run_dir, kept):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, run.run_dir)
        kept.mkdir()
        while True:
            child = distill_in_fork(run, kept)
            # half of the attempts end while the process still loads, the others within a few updates
            time.sleep(moments.uniform(0, 0.2 * whole) if kills < KILLS else 0)
            if kills < KILLS:
                assert time.monotonic() < deadline, f"{kills} kills"
                os.kill(child, signal.SIGKILL)
            code = end_of(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        runs += 1
        assert_same(run, kept, straight, kept_straight)
    assert (kills, runs > 0) == (KILLS, True)
