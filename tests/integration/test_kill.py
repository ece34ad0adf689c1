"""A run that is killed with SIGKILL and started again with the same command."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from stepdistill.config.saved import resolved
from stepdistill.data.prepare import prepare
from stepdistill.run.rungs import WEIGHT_NAME, finished_rungs, rung_folder
from stepdistill.stages import open_run
from tests.integration.conftest import tiny_config


@pytest.mark.slow
def test_a_run_killed_and_started_again_gives_bit_identical_weights(finished_run, tmp_path):
    config = tiny_config(tmp_path / "runs")
    open_run(config)
    prepare(config)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(resolved(config)))
    command = [sys.executable, "-m", "stepdistill", "distill", str(path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600  # a busy machine is slow to import torch
    while not (config.run_dir / "rungs" / "8" / "rung.json").is_file():
        assert time.monotonic() < deadline
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    first.kill()
    first.wait()
    before = finished_rungs(config.run_dir)
    assert before[:2] == [32, 8]
    assert len(before) < 5
    stamp = os.stat(rung_folder(config.run_dir, 8) / WEIGHT_NAME).st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert os.stat(rung_folder(config.run_dir, 8) / WEIGHT_NAME).st_mtime_ns == stamp
    for steps in (32, 8, 4, 2, 1):
        weights, expected = (
            (rung_folder(run, steps) / WEIGHT_NAME).read_bytes()
            for run in (config.run_dir, finished_run.run_dir)
        )
        assert weights == expected, steps
