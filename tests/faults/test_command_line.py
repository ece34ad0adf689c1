"""Mistakes at the command line: one line, exit code 2, under two seconds, nothing written."""

import os
import resource
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch

from stepdistill import before_stage, errors, launch
from stepdistill.cli import app, guarded
from stepdistill.errors import (
    CheckpointError,
    DataError,
    DistributedError,
    FolderInUseError,
    NonFiniteError,
    OutOfMemoryError,
)
from stepdistill.teacher.source import check_teacher


def processor_seconds():
    """Of all child processes that have ended; other work on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stepdistill(*arguments, cwd=None):
    """The completed process, and its seconds of processor time."""
    before = processor_seconds()
    completed = subprocess.run(
        [sys.executable, "-m", "stepdistill", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    return completed, processor_seconds() - before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainign.seed=3", "nearest: training"),
        ("seed=blue", "seed: got 'blue'"),
        ("ladder.1.student_steps=12", "allowed: 1, 2, 4, 8, 16"),
        ("teacher.path=/nowhere/model", "no folder at /nowhere/model"),
        ("preview.prompts=[]", "preview.prompts"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_in_under_two_seconds(tmp_path, override, says):
    completed, _ = stepdistill("run", "configs/letters.yaml", f"output_dir={tmp_path / 'runs'}", override)
    again, seconds = stepdistill("run", "configs/letters.yaml", f"output_dir={tmp_path / 'runs'}", override)
    assert completed.returncode == again.returncode == 2
    assert says in completed.stderr
    assert len(completed.stderr.strip().splitlines()) == 1
    assert seconds < 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_images_that_the_table_cannot_measure_are_reported_before_training(tmp_path):
    options = (f"output_dir={tmp_path / 'runs'}", "evaluation.patch_size=64")
    completed, _ = stepdistill("run", "configs/letters.yaml", *options)
    assert completed.returncode == 2
    assert "evaluation.patch_size: got 64; allowed: 32" in completed.stderr
    assert not (tmp_path / "runs" / "letters" / "rungs").exists()


@pytest.mark.parametrize("command", ["run", pytest.param("doctor", marks=pytest.mark.slow)])
def test_output_that_cannot_be_written_is_one_line(tmp_path, command):
    words = [
        "configs/letters.yaml",
        f"output_dir={tmp_path / 'runs'}",
        *(["--dry-run"] if command == "run" else []),
    ]
    with open("/dev/full", "w") as full:
        completed = subprocess.run(
            [sys.executable, "-m", "stepdistill", command, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert completed.returncode == 2
    assert completed.stderr.splitlines()[-1].startswith("stepdistill: cannot ")
    assert "No space left on device" in completed.stderr.splitlines()[-1]
    assert "Traceback" not in completed.stderr
    assert "Exception ignored" not in completed.stderr


def test_an_output_folder_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "runs" / "letters"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    completed, _ = stepdistill("run", "configs/letters.yaml", f"output_dir={tmp_path / 'runs'}")
    assert completed.returncode == 2
    assert "holds files that are no run's" in completed.stderr
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_dry_run_prints_config_and_plan_and_writes_nothing(tmp_path):
    completed, _ = stepdistill(
        "run", "configs/letters.yaml", f"output_dir={tmp_path / 'runs'}", "seed=9", "--dry-run"
    )
    assert completed.returncode == 0
    assert "seed: 9" in completed.stdout
    assert "32 -> 8" in completed.stdout
    assert "network passes of one sample" in completed.stdout
    assert completed.stdout.splitlines()[-1].startswith("not checked here: data, weights, taps, teachers")
    assert not (tmp_path / "runs").exists()


def test_dry_run_refuses_a_resolution_that_the_run_would_refuse(tmp_path):
    options = (f"output_dir={tmp_path / 'runs'}", "data.resolution=33", "--dry-run")
    completed, _ = stepdistill("run", "configs/letters.yaml", *options)
    assert completed.returncode == 2
    assert completed.stderr.splitlines()[-1] == (
        "stepdistill: data.resolution: got 33; allowed: multiples of 8, such as 32"
    )


def test_dry_run_of_shrink_needs_the_section(tmp_path):
    options = (f"output_dir={tmp_path / 'runs'}", "--dry-run")
    completed, _ = stepdistill("shrink", "configs/letters.yaml", *options)
    assert completed.returncode == 2
    assert "shrink: got no such section" in completed.stderr


def test_dry_run_of_a_stage_prints_only_its_part_of_the_plan(tmp_path):
    options = ("configs/letters.yaml", f"output_dir={tmp_path / 'runs'}", "--dry-run")
    completed, _ = stepdistill("distill", *options, "--rung", "32:8")
    plan = completed.stdout.partition("run folder")[2]
    assert "distill    32 -> 8" in plan
    assert "32 -> 32" not in plan
    assert "evaluate" not in plan
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["prepare", "distill", "export", "evaluate", "report"])
def test_a_stage_script_shows_the_usage_of_a_command_that_exists(stage, capsys):
    assert runpy.run_path(f"pipelines/{stage}.py")["main"]([]) == 2
    assert f"Usage: stepdistill {stage} [OPTIONS] " in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage", ["distill", *(pytest.param(s, marks=pytest.mark.slow) for s in ("export", "evaluate", "report"))]
)
def test_a_stage_script_names_the_stage_that_must_run_first(tmp_path, stage):
    completed = subprocess.run(
        [sys.executable, f"pipelines/{stage}.py", "configs/letters.yaml", f"output_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == (4 if stage == "distill" else 2)
    before = {"distill": "prepare", "export": "distill", "evaluate": "distill", "report": "distill"}[stage]
    assert f"stepdistill {before}" in completed.stderr
    assert "Traceback" not in completed.stderr
    if stage in (
        "distill",
        "report",
    ):  # a run that has nothing to work on is not started: its settings may still change
        assert not (tmp_path / "letters" / "config.yaml").exists()


def test_a_rung_that_is_not_in_the_ladder_is_refused(tmp_path):
    completed, _ = stepdistill("distill", "configs/letters.yaml", f"output_dir={tmp_path}", "--rung", "16:8")
    assert completed.returncode == 2
    assert "32:32, 32:8" in completed.stderr
    completed, _ = stepdistill("distill", "configs/letters.yaml", f"output_dir={tmp_path}", "--rung", "32-8")
    assert completed.returncode == 2
    assert "TEACHER:STUDENT" in completed.stderr


def test_sample_of_a_folder_that_is_not_a_run_is_refused(tmp_path):
    completed, _ = stepdistill("sample", str(tmp_path), "--prompt", "a red letter a on white")
    assert completed.returncode == 2
    assert "not the folder of a run" in completed.stderr


@pytest.mark.parametrize("stage", ["prepare", "distill", "export", "report"])
def test_a_command_examines_the_teachers_files_once(tmp_path, monkeypatch, stage):
    """They are the headers of all weights. Each command stops soon after, because the run has no data or no rung."""
    examined = []
    monkeypatch.setattr(before_stage, "check_teacher", lambda config: examined.append(check_teacher(config)))
    settings = (f"output_dir={tmp_path}", f"data.source={tmp_path / 'none'}", "evaluation.features=none")
    assert guarded(lambda: app([stage, "configs/letters.yaml", *settings])) in (2, 4)
    assert len(examined) == 1


def test_a_command_for_one_process_refuses_a_launch_of_several(tmp_path, capsys, monkeypatch):
    place, prompt = f"output_dir={tmp_path / 'runs'}", ("--prompt", "a red letter a on white")
    for number in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(launch, "_FIRST_PROCESS_HAS", 0.0)
        monkeypatch.setenv("RANK", number)
        for words in (
            ("run", "configs/letters.yaml", place),
            ("export", "configs/letters.yaml", place),
            ("report", "configs/letters.yaml", place),
            ("report", str(tmp_path)),
            ("sample", str(tmp_path), *prompt, "--output", str(tmp_path / "a.png")),
            ("extract", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "lora")),
        ):
            assert guarded(lambda words=words: app(list(words))) == 2
            lines = [
                line for line in capsys.readouterr().err.splitlines() if line.startswith("stepdistill: ")
            ]
            assert len(lines) == 1
            assert lines[0].startswith(f"stepdistill: {words[0]}: got a launch of several processes")
            assert "launch only `stepdistill prepare`, `distill` and `evaluate`" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [FolderInUseError, DataError, CheckpointError, NonFiniteError, OutOfMemoryError, DistributedError],
)
def test_each_expected_error_is_one_line_with_its_exit_code(error, capsys):
    """Raised by code of the package, because a ValueError from elsewhere keeps its traceback."""

    def command():
        exec(compile("raise error('what went wrong')", errors.__file__, "exec"), {"error": error})

    assert guarded(command) == error.exit_code
    assert capsys.readouterr().err == "stepdistill: what went wrong\n"


def test_torchs_out_of_memory_is_one_line(capsys):
    def command():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    assert guarded(command) == OutOfMemoryError.exit_code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Tried to allocate 2.00 GiB" in line
    assert "evaluation.batch_size" in line


def test_sigterm_during_the_import_of_a_library_is_no_error_of_that_library(capsys):
    def command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RuntimeError("cannot import a module") from None

    assert guarded(command) == 75
    assert "stopped (SIGTERM); the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_outside_training_is_one_line(tmp_path, number, code, name):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "stepdistill",
            "prepare",
            "letters",
            f"output_dir={tmp_path}",
            "data.num_images=100000",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not any((tmp_path / "letters").glob("cache/shards/*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert (
        messages.splitlines()[-1]
        == f"stepdistill: stopped ({name}); the same command continues with what is finished"
    )
    assert "Traceback" not in messages
