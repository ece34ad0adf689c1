"""Every snippet of docs/cluster.md runs, with two processes on the CPU and small scripts in place of SLURM's commands."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from stepdistill import stages
from stepdistill.config.saved import resolved
from stepdistill.run.rungs import finished_rungs
from tests.integration.launched import SECONDS, config_of, environment, log_of, prepared

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
UPDATES = 30  # so many that a signal can come between two of them
SRUN = """#!{python}
# as srun --kill-on-bad-exit=1: starts the tasks, passes SIGTERM on, ends all if one fails, exits with the highest code
import os, signal, subprocess, sys, time

tasks = []
for number in map(str, range(int(os.environ["SLURM_NTASKS"]))):
    place = dict(SLURM_PROCID=number, SLURM_LOCALID=number)
    tasks.append(subprocess.Popen(sys.argv[2:], env=dict(os.environ, **place)))
end = lambda *_: [task.terminate() for task in tasks]
signal.signal(signal.SIGTERM, end)
while {{task.poll() for task in tasks}} <= {{None, 0}} and None in {{task.poll() for task in tasks}}:
    time.sleep(0.05)
end()
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> requeued ;;
esac
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def free_port():
    """A free port from 20000 to 29999, among which job.sh chooses by the job's number."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("every port is in use")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("cache"))
    stages.prepare(config)
    return config.run_dir / "cache"


@pytest.fixture
def place(tmp_path):
    """A folder with my-run.yaml, whose run is beside it, and SLURM's commands; returns a function that makes it."""

    def make(*overrides, cache=None):
        config = config_of(tmp_path / "runs", *overrides)
        (tmp_path / "my-run.yaml").write_text(yaml.safe_dump(resolved(config)))
        if cache is not None:
            prepared(config, cache)
        for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            file = tmp_path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        return config

    return make


def started(script, folder, *arguments, **more):
    """bash runs a snippet in a folder; more: environment variables."""
    small = script.replace("nproc_per_node 8", "nproc_per_node 2").replace(
        "num_processes 8", "num_processes 2"
    )
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (folder / "job.sh").write_text(small)
    return subprocess.Popen(
        ["bash", "-e", str(folder / "job.sh"), *arguments]
        if "srun" not in script
        else ["bash", "job.sh", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PATH=path, PYTHONPATH=python_path, **more),
    )


def ended(process):
    """(exit code, standard error)."""
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, errors


def wait_for_update(config, process):
    deadline = time.monotonic() + SECONDS
    while not (config.run_dir / "log.jsonl").is_file() or not log_of(config):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(shell, name):
    """The processes below a shell that run the program `name`."""
    return [p for p in psutil.Process(shell.pid).children(recursive=True) if name in " ".join(p.cmdline())]


def test_eight_gpus_in_one_machine(place, tmp_path):
    config = place()
    code, errors = ended(started(blocks("sh")[0], tmp_path))
    assert code == 0, errors[-3000:]
    assert finished_rungs(config.run_dir) == [4, 2]
    assert (config.run_dir / "rungs" / "4" / "kohya").is_dir()
    assert (config.run_dir / "report" / "index.html").is_file()


def test_accelerate_launch(place, tmp_path, cache):
    config = place(cache=cache)
    code, errors = ended(
        started(
            blocks("sh")[1].replace("--num_machines 1", "--num_machines 1 --main_process_port 0"), tmp_path
        )
    )
    assert code == 0, errors[-3000:]
    assert finished_rungs(config.run_dir) == [4, 2]


def test_two_machines(place, tmp_path, cache):
    """Two launchers on this machine, with one process each."""
    config = place(cache=cache)
    script = blocks("sh")[2].replace("node-0:29500", f"127.0.0.1:{free_port()}")
    script = script.replace("--nproc_per_node 8", "--nproc_per_node 1 --local-addr 127.0.0.1")
    launchers = [started(script, tmp_path) for _ in range(2)]
    outcomes = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert finished_rungs(config.run_dir) == [4, 2]
    assert len(log_of(config)) == 7


def test_slurm_stops_in_time_and_puts_the_job_back_into_the_queue(place, tmp_path, cache):
    config = place(
        f"ladder.0.phases.0.max_train_steps={UPDATES}", "training.checkpoint.every_minutes=60", cache=cache
    )
    (script,) = (block for block in blocks("bash") if "#SBATCH" in block)
    job = str(free_port() - 20000)
    slurm = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-[0-1]"}
    first = started(script, tmp_path, "distill", **slurm)
    wait_for_update(config, first)
    (srun,) = processes_of(first, "bin/srun")
    srun.send_signal(signal.SIGTERM)
    code, errors = ended(first)
    assert code == 75, errors[-3000:]
    assert (tmp_path / "requeued").read_text() == f"{job}\n"
    assert len(re.findall(r"stepdistill: stopped \(.*\) after update", errors)) == 1
    code, errors = ended(started(script, tmp_path, "distill", SLURM_RESTART_COUNT="1", **slurm))
    assert code == 0, errors[-3000:]
    assert "the 4-step rung continues in phase 0 after" in errors
    assert (tmp_path / "requeued").read_text() == f"{job}\n"
    assert finished_rungs(config.run_dir) == [4, 2]


def test_a_spot_instance_saves_when_all_its_processes_are_told_to_end(place, tmp_path, cache):
    config = place(
        f"ladder.0.phases.0.max_train_steps={UPDATES}", "training.checkpoint.every_minutes=60", cache=cache
    )
    (script,) = (block for block in blocks("bash") if "seq 20" in block)
    shell = started(script.replace("sleep 30", "sleep 1").replace("seq 20", "seq 2"), tmp_path)
    wait_for_update(config, shell)
    for process in processes_of(shell, "distill"):  # torchrun too, which then tells its processes again
        process.send_signal(signal.SIGTERM)
    code, errors = ended(shell)
    assert code == 0, errors[-3000:]
    assert len(re.findall(r"stepdistill: stopped \(.*\) after update", errors)) == 1
    assert "the 4-step rung continues in phase 0 after" in errors
    assert finished_rungs(config.run_dir) == [4, 2]
