"""A process of a launch that dies, hangs or raises ends the launch soon, with its own message; the next start continues."""

import json
import os
import re
import shutil
import signal
import socket
import time

import psutil
import pytest

from stepdistill import stages
from stepdistill.run.checkpoint_files import CHECKPOINTS, folders_of
from stepdistill.run.lock import LOCK
from tests.faults.failing_rank import MESSAGE
from tests.faults.small_run import copy_of
from tests.integration.launched import (
    TORCHRUN,
    config_of,
    distilled,
    ended,
    log_of,
    prepared,
    said,
    started,
    weights_of,
)

pytestmark = pytest.mark.slow
MINUTES = 0.1
IMPORTS, AGENT = 90, 30
"""Seconds until training begins on a busy machine; seconds in which torchrun waits for a process that it has told to end."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The config of a run that two processes trained without a failure."""
    config = config_of(tmp_path_factory.mktemp("straight"))
    stages.prepare(config)
    distilled(TORCHRUN, config)
    stages.export(config)
    return config


def failed(place, failure, rank, stage, config):
    """(exit code, standard error, seconds) of a launch whose process number `rank` fails."""
    began = time.monotonic()
    code, errors = ended(
        TORCHRUN,
        *("-m", "tests.faults.failing_rank", place, failure, str(rank), stage),
        str(config.run_dir / "config.yaml"),
        f"training.distributed_timeout={MINUTES}",
    )
    return code, errors, time.monotonic() - began


def check_messages(place, failure, rank, errors):
    """The failing process shows its own message, the other one exactly one line, without a traceback, and exits with 8; with
    75 if it was drawing when torchrun told it to end, because a cluster's notice is the same signal. torchrun names the
    process that failed first, and the other one only if that ended too before it looked."""
    (line,) = said(errors)
    assert f"[rank{1 - rank}]" not in errors
    assert errors.count(f"[rank{rank}]: Traceback") == (failure == "raised")
    expected = {
        "raised": f"process {rank} of the launch ended: RuntimeError: {MESSAGE}",
        "killed": "another process of the launch ended",
        "stopped": "another process of the launch did not answer within training.distributed_timeout",
    }
    is_told = "stopped (SIGTERM); the same command continues" in line and place == "drawing"
    assert expected[failure] in line or is_told
    codes = dict(re.findall(r"rank +: (\d).*?\n +exitcode +: (-?\d+)", errors))
    all_codes = {str(rank): "1" if failure == "raised" else "-9", str(1 - rank): "75" if is_told else "8"}
    first = str(1 - rank if failure == "stopped" else rank)
    assert {first: all_codes[first]}.items() <= codes.items() <= all_codes.items()


@pytest.mark.parametrize(
    ("place", "failure", "rank"),
    [
        ("update", "raised", 1),
        ("update", "killed", 1),
        ("update", "stopped", 1),
        ("save", "raised", 0),
        ("half_saved", "killed", 0),
        ("rung", "killed", 0),
    ],
)
def test_a_failure_in_training_ends_all_and_the_next_start_continues(
    straight, tmp_path, place, failure, rank
):
    config = prepared(config_of(tmp_path), straight.run_dir / "cache")
    code, errors, seconds = failed(place, failure, rank, "distill", config)
    assert code == 1
    assert seconds < IMPORTS + (60 * MINUTES + AGENT) * (failure == "stopped")
    check_messages(place, failure, rank, errors)
    after = (
        "continues after its last update" if place == "rung" else "continues in phase 0 after 1 of 3 updates"
    )
    assert f"the 4-step rung {after}" in distilled(TORCHRUN, config)
    assert weights_of(config) == weights_of(straight)
    assert log_of(config) == log_of(straight)


def test_a_number_that_is_not_finite_in_one_process_stops_all_before_the_update(straight, tmp_path):
    config = prepared(config_of(tmp_path), straight.run_dir / "cache")
    code, errors, _ = failed("move", "nan", 1, "distill", config)
    assert code == 1
    (line,) = said(errors)
    assert "step 1: student_loss = nan" in line
    assert "nothing was updated" in line
    codes = re.findall(r"exitcode +: (-?\d+)", errors)
    assert set(codes) == {"6"}
    assert "continues in phase 0 after 1 of 3 updates" in distilled(TORCHRUN, config)
    assert weights_of(config) == weights_of(straight)


@pytest.mark.parametrize(("failure", "rank"), [("raised", 1), ("killed", 1), ("stopped", 0)])
def test_a_failure_in_evaluation_ends_all_and_the_next_start_continues(straight, tmp_path, failure, rank):
    config = copy_of(straight, tmp_path)
    code, errors, seconds = failed("drawing", failure, rank, "evaluate", config)
    assert code == 1
    assert seconds < IMPORTS + (60 * MINUTES + AGENT) * (failure == "stopped")
    check_messages("drawing", failure, rank, errors)
    path = str(config.run_dir / "config.yaml")
    code, errors = ended(TORCHRUN, "-m", "stepdistill", "evaluate", path)
    assert code == 0, errors[-3000:]
    rows = json.loads((config.run_dir / "evaluation" / "results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["teacher-4", "student-4", "student-2"]


def started_alone(rank, port, config, place, failure, stage):
    """Process number `rank` of a launch of two without a launcher, as srun starts them; it fails at a place."""
    number = str(rank)
    where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    words = ("-m", "tests.faults.failing_rank", place, failure, number, stage)
    return started(words, str(config.run_dir / "config.yaml"), MASTER_ADDR="127.0.0.1", **where)


@pytest.mark.parametrize(
    ("place", "stage", "failure", "code", "cause"),
    [
        ("update", "distill", "raised", 1, f"RuntimeError: {MESSAGE}"),
        ("drawing", "evaluate", "told", 75, "stopped (SIGTERM); the same command continues"),
    ],
)
def test_a_process_that_waits_ends_soon_after_the_other_one_and_leaves_no_lock(
    straight, tmp_path, place, stage, failure, code, cause
):
    config = copy_of(straight, tmp_path)
    if stage == "distill":
        shutil.rmtree(config.run_dir / "rungs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    waits = started_alone(0, port, config, place, "asleep", stage)
    fails = started_alone(1, port, config, place, failure, stage)
    try:
        fails.communicate(timeout=IMPORTS)
        _, errors = waits.communicate(timeout=IMPORTS)
    finally:
        waits.kill()
        fails.kill()
    assert (fails.returncode, waits.returncode) == (code, 8)
    (line,) = said(errors)
    assert f"process 1 of the launch ended: {cause}" in line
    assert not (config.run_dir / LOCK).exists()


def test_processes_end_if_their_launcher_is_killed(straight, tmp_path):
    phases = "ladder.0.phases.0.max_train_steps=10000"
    config = prepared(config_of(tmp_path, phases), straight.run_dir / "cache")
    launcher = started(TORCHRUN, "-m", "stepdistill", "distill", str(config.run_dir / "config.yaml"))
    deadline = time.monotonic() + IMPORTS
    while not list(folders_of(config.run_dir / "rungs" / ".4.partial" / CHECKPOINTS)):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=15)
    for process in alive:
        process.kill()
    _, errors = launcher.communicate(timeout=15)
    assert alive == []
    assert "Traceback" not in errors
    assert 1 <= len(said(errors)) <= 2
    assert all("was killed; fix: " in line or "another process" in line for line in said(errors))
    path = str(config.run_dir / "config.yaml")
    _, errors = ended(TORCHRUN, "-m", "stepdistill", "distill", path, "training.max_minutes=1e-6")
    assert "the 4-step rung continues in phase 0 after" in errors
