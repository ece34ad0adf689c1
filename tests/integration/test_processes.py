"""Several processes train what one does, log means over all, continue from one checkpoint, and share the run's folder."""

import json
import os
import shutil

import pytest

from stepdistill import stages
from tests.integration.launched import (
    ACCELERATE,
    TORCHRUN,
    config_of,
    difference,
    distilled,
    ended,
    log_of,
    prepared,
    said,
    weights_of,
)

pytestmark = pytest.mark.slow
ALONE = ()
IN_ONE, IN_TWO = "training.gradient_accumulation_steps=1", "training.gradient_accumulation_steps=2"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("cache"))
    stages.prepare(config)
    return config.run_dir / "cache"


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """A run of one process with four samples in an update, which are one micro-batch."""
    config = prepared(config_of(tmp_path_factory.mktemp("alone"), samples=4), cache)
    distilled(ALONE, config)
    return config


@pytest.fixture(scope="module")
def alone_in_two(cache, tmp_path_factory):
    """A run of one process with the same four samples in two micro-batches: those that two processes have."""
    config = prepared(config_of(tmp_path_factory.mktemp("alone_in_two"), IN_TWO, samples=2), cache)
    distilled(ALONE, config)
    return config


@pytest.mark.parametrize("launch", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_two_processes_train_what_one_does_with_twice_the_samples(cache, alone, tmp_path, launch):
    config = prepared(config_of(tmp_path), cache)
    distilled(launch, config)
    assert difference(config, alone) < 1e-3  # other samples would make it about 1
    assert len(log_of(config)) == len(log_of(alone)) == 7
    for ours, theirs in zip(log_of(config), log_of(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"objective"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (theirs["step"], name)


def stopped_and_continued(config, first, second, *overrides):
    """Distils with the launch `first`, one update per start, twice; then to the end with the launch `second`."""
    path = str(config.run_dir / "config.yaml")
    for _ in range(2):
        code, errors = ended(first, "-m", "stepdistill", "distill", path, "training.max_minutes=1e-6")
        assert code == (1 if first else 75), errors[-3000:]  # torchrun has a code of its own
        assert [line.split(" after ")[0] for line in said(errors)] == [
            "stepdistill: stopped (training.max_minutes is used)"
        ]
    return distilled(second, config, "training.max_minutes=null", *overrides)


@pytest.mark.parametrize(
    ("first", "samples", "second", "then"),
    [(ALONE, 4, TORCHRUN, 2), (TORCHRUN, 2, ALONE, 4)],
    ids=["1-2", "2-1"],
)
def test_another_number_of_processes_continues_with_the_same_samples(
    cache, alone, tmp_path, first, samples, second, then
):
    config = prepared(config_of(tmp_path, samples=samples), cache)
    errors = stopped_and_continued(config, first, second, f"training.train_batch_size={then}")
    assert "continues in phase 0 after 2 of 3 updates" in errors
    assert difference(config, alone) < 1e-3  # other samples would make it about 1
    assert [(r["rung"], r["phase"], r["step"]) for r in log_of(config)] == [
        (r["rung"], r["phase"], r["step"]) for r in log_of(alone)
    ]


@pytest.mark.parametrize(
    ("first", "split", "second", "then"),
    [(ALONE, IN_TWO, TORCHRUN, IN_ONE), (TORCHRUN, IN_ONE, ALONE, IN_TWO)],
    ids=["1-2", "2-1"],
)
def test_the_same_micro_batches_in_another_number_of_processes_are_equal_to_the_bit(
    cache, alone_in_two, tmp_path, first, split, second, then
):
    """The sum of two gradients does not depend on their order, and their division by two is exact."""
    config = prepared(config_of(tmp_path, split, samples=2), cache)
    errors = stopped_and_continued(config, first, second, then)
    assert "continues in phase 0 after 2 of 3 updates" in errors
    assert weights_of(config) == weights_of(alone_in_two)


def test_another_number_of_samples_is_refused_in_one_line(cache, tmp_path):
    config = prepared(config_of(tmp_path), cache)
    path = str(config.run_dir / "config.yaml")
    ended(TORCHRUN, "-m", "stepdistill", "distill", path, "training.max_minutes=1e-6")
    code, errors = ended(ALONE, "-m", "stepdistill", "distill", path, "training.max_minutes=null")
    assert code in (2, 5)
    (line,) = said(errors)
    assert "4" in line
    assert "2" in line


def test_torchrun_starts_again_by_itself_after_a_process_was_killed(cache, tmp_path):
    straight = prepared(config_of(tmp_path / "straight"), cache)
    distilled(TORCHRUN, straight)
    config = prepared(config_of(tmp_path / "killed"), cache)
    failing = ("-m", "tests.faults.failing_rank", "update", "killed", "1", "distill")
    code, errors = ended((*TORCHRUN, "--max-restarts=3"), *failing, str(config.run_dir / "config.yaml"))
    assert code == 0, errors[-3000:]
    assert errors.count("the 4-step rung continues in phase 0 after 1 of 3 updates") == 1
    assert weights_of(config) == weights_of(straight)
    assert log_of(config) == log_of(straight)


def test_processes_that_do_not_share_the_folder_are_told_so_in_one_line(cache, tmp_path):
    """Two launches of one process each, as on two machines, with a folder of the same name that is not the same."""
    config = prepared(config_of(tmp_path / "0"), cache)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    script = tmp_path / "machine.py"
    script.write_text(
        "import os, sys\n"
        "from stepdistill.cli import app, guarded\n"
        f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
        f"arguments = ['distill', '{config.name}/config.yaml', 'output_dir=.']\n"
        "sys.exit(guarded(lambda: app(arguments)))\n"
    )
    code, errors = ended(TORCHRUN, str(script), PYTHONPATH=os.getcwd())
    assert code == 1
    assert "exitcode  : 2" in errors
    (line,) = said(errors)
    assert "does not see what process 0 writes into" in line
    assert "fix: output_dir=" in line
    assert list((tmp_path / "0").rglob(".shared*")) == []


def test_an_error_that_all_processes_have_is_printed_once(cache, tmp_path):
    config = prepared(config_of(tmp_path), cache)
    for wrong in ("training.nothing=1", f"ladder={json.dumps([])}"):
        code, errors = ended(
            TORCHRUN, "-m", "stepdistill", "distill", str(config.run_dir / "config.yaml"), wrong
        )
        assert code == 1
        lines = [
            line for line in said(errors) if "stopped (SIGTERM)" not in line
        ]  # torchrun may tell a slow process to end
        assert len(lines) == 1, errors
        assert "exitcode  : 2" in errors
