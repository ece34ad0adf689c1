"""A rung that is stopped between two updates continues from its checkpoint: equal weights, equal log, nothing left over."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import read_json, sealed, write_json
from stepdistill.errors import CheckpointError, ToBeContinued
from stepdistill.ladder import train as train_module
from stepdistill.run.checkpoint_files import CHECKPOINTS, MANIFEST, STATE, folders_of, partial_rung
from stepdistill.run.log import read_log
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from stepdistill.training import phase as phase_module
from tests.integration.conftest import tiny_config
from tests.integration.test_compile import compiled_by
from tests.integration.test_prepare import write_good

TIMES = ("images_per_second", "data_seconds")
UPDATES = 3
MSE = {"objective": "mse", "max_train_steps": UPDATES, "learning_rate": 1e-3}
PAIRED, SINGLE = (MSE | {"objective": kind} for kind in ("paired", "single"))


def carried(**options):
    return SINGLE | {"discriminator": {"start": "carried", **options}}


LADDERS = {
    "mse": [MSE],
    "mse, paired, single": [MSE, PAIRED, SINGLE],
    "cached": [MSE | {"cached_updates": 2}, SINGLE],
    "full trunk, carried": [PAIRED | {"discriminator": {"trunk": "full"}}, carried(trunk="full"), MSE],
    "carried over an mse phase": [PAIRED, MSE, carried()],
    "several": [{**MSE, "objective": None, "objectives": [{"kind": "mse"}, {"kind": "single"}]}],
    "distribution matching from own inputs": [
        {
            **MSE,
            "objective": None,
            "objectives": [{"kind": "dmd"}, {"kind": "single", "weight": 0.1}],
            "inputs": "own",
            "critic_updates": 2,
        },
        MSE,
    ],
    "balanced features": [
        {
            **MSE,
            "objective": None,
            "objectives": [
                {"kind": "mse"},
                {"kind": "l2", "taps": ["encoder", "decoder"], "weight": 0.1},
                {"kind": "relations", "weight": 0.5, "final_weight": 0.0},
            ],
            "balance": "gradient",
        }
    ],
}


STOPPED_AFTER_EVERY_UPDATE = ("mse", "mse, paired, single")
"""The other ladders are stopped after every second one."""


class Stopped(BaseException):
    """As a kill between two updates."""


def config_of(folder, phases, *overrides):
    rungs = [
        {"teacher_steps": 8, "student_steps": 4, "phases": phases},
        {"teacher_steps": 4, "student_steps": 2, "phases": phases[:1]},
    ]
    return tiny_config(
        folder, f"ladder={json.dumps(rungs)}", "training.checkpoint={every_minutes: 0, keep: 2}", *overrides
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """cache/ of a run, for all of them."""
    config = config_of(tmp_path_factory.mktemp("cache"), LADDERS["mse"])
    stages.prepare(config)
    return config.run_dir / "cache"


def prepared(config, cache):
    stages.open_run(config)
    shutil.copytree(cache, config.run_dir / "cache")
    return config


def distill_and_stop(config, monkeypatch, *, after):
    """Trains until this many updates are done, and is stopped before the next one."""
    done, update = [0], phase_module.update

    def counted(*args):
        if done[0] == after:
            raise Stopped
        done[0] += 1
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(phase_module, "update", counted)
        with pytest.raises(Stopped):
            stages.distill(config)
    for writer in threading.enumerate():
        if writer.name == "checkpoint writer":
            writer.join()


def log_of(config):
    lines = read_log(config.run_dir / "log.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights_of(config):
    return [(rung_folder(config.run_dir, n) / WEIGHT_NAME).read_bytes() for n in (4, 2)]


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ema"), [("mse", 0.0), *((name, 0.5) for name in LADDERS)])
def test_stopped_at_any_update_it_continues_to_equal_weights_and_an_equal_log(
    cache, tmp_path, monkeypatch, name, ema
):
    overrides = [f"training.ema_decay={ema}"]
    straight = prepared(config_of(tmp_path / "straight", LADDERS[name], *overrides), cache)
    stages.distill(straight)
    total = len(log_of(straight))
    assert total == UPDATES * (len(LADDERS[name]) + 1)
    stopped = prepared(config_of(tmp_path / "stopped", LADDERS[name], *overrides), cache)
    done, every = 0, 1 if name in STOPPED_AFTER_EVERY_UPDATE else 2
    while done + every < total:
        distill_and_stop(stopped, monkeypatch, after=every)
        done += every
    stages.distill(stopped)
    assert weights_of(stopped) == weights_of(straight)
    assert log_of(stopped) == log_of(straight)
    assert files_below(stopped.run_dir / "rungs") == files_below(straight.run_dir / "rungs")


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_continues_to_equal_weights(cache, tmp_path, monkeypatch):
    """On the second rung, whose first phase has the rung before as its teacher."""
    phases = json.dumps([MSE, MSE | {"teacher": "ema", "teacher_decay": 0.9}])
    straight, stopped = (
        prepared(config_of(tmp_path / name, LADDERS["mse"], f"ladder.1.phases={phases}"), cache)
        for name in ("straight", "stopped")
    )
    stages.distill(straight)
    for after in (4, 3, 1):  # within the first rung, at the phase's start and within it
        distill_and_stop(stopped, monkeypatch, after=after)
    stages.distill(stopped)
    assert weights_of(stopped) == weights_of(straight)
    assert log_of(stopped) == log_of(straight)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_with_8_bit_adam_and_micro_batches_it_continues_to_equal_weights(
    cache, tmp_path, monkeypatch
):
    """The blocks' graphs; test_compile.py continues with the C++ code that is built of them, which takes minutes."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compiled_by, "aot_eager"))
    overrides = [
        *("training.compile=true", "training.optimizer=adam8bit", "training.gradient_checkpointing=true"),
        *("training.train_batch_size=2", "training.gradient_accumulation_steps=2"),
    ]
    straight, stopped = (
        prepared(config_of(tmp_path / name, [MSE, SINGLE], *overrides), cache)
        for name in ("straight", "stopped")
    )
    stages.distill(straight)
    distill_and_stop(stopped, monkeypatch, after=4)  # within the second phase
    stages.distill(stopped)
    assert weights_of(stopped) == weights_of(straight)
    assert log_of(stopped) == log_of(straight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's compiled code is another")
def test_half_precision_compiled_for_a_cpu_is_refused(cache, tmp_path):
    options = ["training.compile=true", "training.mixed_precision=bf16"]
    config = prepared(config_of(tmp_path, LADDERS["mse"], *options), cache)
    with pytest.raises(
        ConfigError, match=r"mixed_precision bf16 on a CPU.*fix: training\.mixed_precision=no"
    ):
        stages.distill(config)


@pytest.fixture(scope="module")
def interrupted_once(cache, tmp_path_factory):
    """The folder of a run that was stopped after two updates of its second phase."""
    config = prepared(
        config_of(tmp_path_factory.mktemp("interrupted"), LADDERS["mse, paired, single"]), cache
    )
    with pytest.MonkeyPatch.context() as patch:
        distill_and_stop(config, patch, after=UPDATES + 2)
    return config.run_dir


@pytest.fixture
def interrupted(interrupted_once, tmp_path):
    """A copy of that run, which a test may change."""
    config = config_of(tmp_path, LADDERS["mse, paired, single"])
    shutil.copytree(interrupted_once, config.run_dir)
    return config


def checkpoints_of(config):
    return list(folders_of(partial_rung(config.run_dir, 4) / CHECKPOINTS))


def test_only_the_newest_checkpoints_stay_and_hold_nothing_but_safetensors_and_json(interrupted):
    """The newest two, and the state at the start of the phase."""
    newest, before, first = checkpoints_of(interrupted)
    assert [p.name for p in (newest, before, first)] == [f"phase1-step00000{step}" for step in (2, 1, 0)]
    assert files_below(newest.parent) == [
        f"{p.name}/{f}" for p in (first, before, newest) for f in (MANIFEST, STATE)
    ]


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        *((STATE, damage) for damage in ("flipped", "missing")),
        *((MANIFEST, damage) for damage in ("cut", "missing")),
    ],
)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(interrupted, caplog, part, damage):
    newest, before, _ = checkpoints_of(interrupted)
    caplog.set_level("INFO")
    content = bytearray((newest / part).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (newest / part).unlink()
    else:
        (newest / part).write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    stages.distill(interrupted)
    assert f"{newest} is missing or not as it was written" in caplog.text
    assert "continues in phase 1 after 1 of 3 updates" in caplog.text
    assert len({(r["rung"], r["phase"], r["step"]) for r in log_of(interrupted)}) == len(log_of(interrupted))
    assert not before.parent.exists()


@pytest.mark.slow
def test_if_all_are_damaged_the_rung_starts_again_with_a_warning(interrupted, caplog):
    for folder in checkpoints_of(interrupted):
        (folder / STATE).write_bytes(b"")
    stages.distill(interrupted)
    assert caplog.text.count("is missing or not as it was written") == 3
    assert [(r["phase"], r["step"]) for r in log_of(interrupted)[:2]] == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base", "0" * 16, "another base model"),
        ("cache", "", "other latents"),
    ],
)
@pytest.mark.slow_after_first
def test_a_checkpoint_of_something_else_is_refused(interrupted, key, value, message):
    newest = checkpoints_of(interrupted)[0] / MANIFEST
    about = {k: v for k, v in read_json(newest).items() if k != "checksum"}
    about["identity"] |= {key: value}
    write_json(newest, sealed(about))
    with pytest.raises(CheckpointError) as refused:
        stages.distill(interrupted)
    assert message in str(refused.value)


def changed(config, *overrides):
    """The config with overrides, for the same folder."""
    return load_config(config.run_dir, list(overrides))


@pytest.mark.slow
def test_a_changed_setting_refuses_with_its_values_and_names_what_to_remove(
    cache, interrupted, tmp_path, caplog
):
    """After the named checkpoints are removed, the phase is trained with the new rate; the phase before it is kept."""
    rate = "ladder.0.phases.1.learning_rate=5e-4"
    newest, before, first = checkpoints_of(interrupted)
    with pytest.raises(CheckpointError) as refused:
        stages.distill(changed(interrupted, rate))
    assert "ladder.0.phases.1.learning_rate: 0.001 -> 0.0005" in str(refused.value)
    assert f"remove {newest} and {before}, and training continues from {first.name}" in str(refused.value)
    assert load_config(interrupted.run_dir) == interrupted
    for folder in (newest, before):
        shutil.rmtree(folder)
    caplog.set_level("INFO")
    stages.distill(changed(interrupted, rate))
    assert "continues in phase 1 after 0 of 3 updates" in caplog.text
    straight = prepared(config_of(tmp_path / "straight", LADDERS["mse, paired, single"], rate), cache)
    stages.distill(straight)
    assert weights_of(interrupted) == weights_of(straight)
    assert log_of(interrupted) == log_of(straight)


def test_settings_of_later_phases_may_change(interrupted, caplog):
    caplog.set_level("INFO")
    stages.check_run(changed(interrupted, "ladder.0.phases.2.learning_rate=5e-4", "ladder.1.node_steps=4"))
    with pytest.raises(CheckpointError, match=r"the rung of 4 steps: 'in the ladder' -> 'not in the ladder'"):
        stages.check_run(
            changed(
                interrupted,
                "ladder.0.student_steps=2",
                "ladder.1.teacher_steps=2",
                "ladder.1.student_steps=1",
            )
        )


@pytest.mark.slow
def test_the_split_of_an_updates_samples_and_recomputed_activations_may_change(cache, interrupted, tmp_path):
    """Recomputing gives equal bits; other micro-batches round differently, which Adam amplifies where gradients are tiny."""
    straight = prepared(config_of(tmp_path / "straight", LADDERS["mse, paired, single"]), cache)
    stages.distill(straight)
    again = tmp_path / "again"
    shutil.copytree(interrupted.run_dir, again / interrupted.name)
    recomputed = changed(interrupted, "training.gradient_checkpointing=true")
    stages.distill(recomputed)
    assert weights_of(recomputed) == weights_of(straight)
    split = load_config(
        again / interrupted.name, ["training.train_batch_size=2", "training.gradient_accumulation_steps=2"]
    )
    stages.distill(split)
    for steps in (4, 2):
        one, other = (load_file(rung_folder(c.run_dir, steps) / WEIGHT_NAME) for c in (straight, split))
        off = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
        assert (off > 1e-5).sum() < 1e-4 * len(off)
        assert off.norm() < 1e-4 * torch.cat([value.flatten() for value in one.values()]).norm()
        assert (
            off.max() < 1e-3
        )  # the learning rate: a tiny gradient whose sign rounding changes moves a weight that far


def test_another_number_of_samples_is_refused(interrupted):
    with pytest.raises(CheckpointError, match=r"updates of 4 samples \(now 8\)"):
        stages.distill(changed(interrupted, "training.gradient_accumulation_steps=2"))


@pytest.mark.slow
def test_another_version_is_warned_of(interrupted, caplog):
    newest = checkpoints_of(interrupted)[0] / MANIFEST
    about = {k: v for k, v in read_json(newest).items() if k != "checksum"}
    about["identity"]["versions"]["torch"] = "1.0"
    write_json(newest, sealed(about))
    stages.distill(interrupted)
    assert "other versions (torch: '1.0' -> " in caplog.text


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(cache, tmp_path, monkeypatch, caplog):
    config = prepared(config_of(tmp_path, LADDERS["mse"]), cache)

    def full(*_args):
        raise ValueError("cannot write: No space left on device")

    monkeypatch.setattr("stepdistill.training.checkpoint.whole_folder", full)
    stages.distill(config)
    assert "no checkpoint at phase 0, step 1: cannot write" in caplog.text
    assert len(weights_of(config)) == 2


@pytest.mark.slow
def test_a_stop_whose_state_cannot_be_written_does_not_say_that_it_is(cache, tmp_path, monkeypatch, caplog):
    """A job that starts again after exit code 75 would make the same updates for ever."""
    config = prepared(config_of(tmp_path, LADDERS["mse"]), cache)

    def full(*_args):
        raise MemoryError

    monkeypatch.setattr("stepdistill.training.checkpoint.whole_folder", full)
    with pytest.raises(
        CheckpointError, match=r"stopped after update 1 of 3 of 8 -> 4 mse, but its state could not be"
    ):
        stages.distill(changed(config, "training.max_minutes=1e-6"))
    assert "no checkpoint at phase 0, step 1: MemoryError" in caplog.text


@pytest.mark.slow
def test_damaged_checkpoints_do_not_take_the_place_of_new_ones(interrupted, monkeypatch):
    for folder in checkpoints_of(interrupted)[:2]:
        (folder / STATE).write_bytes(b"")
    distill_and_stop(changed(interrupted, "training.checkpoint.keep=1"), monkeypatch, after=1)
    assert [p.name for p in checkpoints_of(interrupted)] == [f"phase1-step00000{step}" for step in (1, 0)]


@pytest.mark.slow
def test_the_checkpoints_of_a_later_rung_outlive_an_earlier_rung_that_comes_out_the_same(
    cache, tmp_path, monkeypatch, caplog
):
    straight = prepared(config_of(tmp_path / "straight", LADDERS["mse"]), cache)
    stages.distill(straight)
    config = prepared(config_of(tmp_path / "stopped", LADDERS["mse"]), cache)
    distill_and_stop(config, monkeypatch, after=UPDATES + 2)
    stages.distill(config, only=(8, 4))
    assert "the training of the 2-step rung is not finished" in caplog.text
    caplog.set_level("INFO")
    stages.distill(config)
    assert "the 2-step rung continues in phase 0 after 2 of 3 updates" in caplog.text
    assert weights_of(config) == weights_of(straight)
    assert files_below(config.run_dir / "rungs") == files_below(straight.run_dir / "rungs")


@pytest.mark.slow
def test_the_share_that_is_held_out_need_not_be_said_again(cache, tmp_path, monkeypatch, caplog):
    source = write_good(tmp_path / "pictures", 50)
    words = [f"data.source={source}", "data.resolution=64"]
    begun = config_of(tmp_path, LADDERS["mse"], *words, "data.held_out=0.2")
    stages.prepare(begun)
    distill_and_stop(begun, monkeypatch, after=1)
    caplog.set_level("INFO")
    distill_and_stop(config_of(tmp_path, LADDERS["mse"], *words), monkeypatch, after=1)
    assert "continues in phase 0 after 1 of 3 updates" in caplog.text
    stages.distill(changed(begun))
    assert "continues in phase 0 after 2 of 3 updates" in caplog.text


@pytest.mark.slow
def test_a_signal_after_the_last_update_stops_the_command_before_its_next_stage(cache, tmp_path, monkeypatch):
    config = prepared(config_of(tmp_path, LADDERS["mse"]), cache)
    finish = train_module.finish_rung

    def interrupted_at_the_end(shared, rung, *args, **options):
        if rung.student_steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        finish(shared, rung, *args, **options)

    monkeypatch.setattr(train_module, "finish_rung", interrupted_at_the_end)
    with pytest.raises(ToBeContinued, match=r"stopped \(SIGTERM\) after the last rung") as stop:
        stages.run_all(config)
    assert stop.value.exit_code == 75
    assert len(weights_of(config)) == 2
    assert not (config.run_dir / "evaluation").exists()


def started(config, tmp_path, *overrides):
    """`stepdistill distill` as a process."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(resolved(config)))
    command = [sys.executable, "-m", "stepdistill", "distill", str(path), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_update(config, process):
    deadline = time.monotonic() + 300
    while not (config.run_dir / "log.jsonl").is_file() or not log_of(config):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_the_update_finish_saves_and_says_how_to_continue(cache, tmp_path, number, code):
    long = [MSE | {"max_train_steps": 200}]
    config = prepared(config_of(tmp_path, long, "training.checkpoint.every_minutes=60"), cache)
    process = started(config, tmp_path)
    wait_for_update(config, process)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == code, messages
    steps = len(log_of(config))
    assert messages.count(f"stopped ({number.name}) after update {steps} of 200 of 8 -> 4 mse") == 1
    assert [folder.name for folder in checkpoints_of(config)] == [
        f"phase0-step{steps:06d}",
        "phase0-step000000",
    ]
    assert "Traceback" not in messages


@pytest.mark.slow
def test_a_time_budget_stops_a_command_and_the_next_one_continues(cache, tmp_path):
    one_update = [MSE | {"max_train_steps": 1}]
    config = prepared(config_of(tmp_path / "a", one_update), cache)
    straight = prepared(config_of(tmp_path / "b", one_update), cache)
    stages.distill(straight)
    codes = []
    while not codes or codes[-1] == 75:
        process = started(config, tmp_path, "training.max_minutes=1e-6")
        process.communicate(timeout=300)
        codes.append(process.returncode)
    assert codes == [75] * 3 + [0]  # after each update, and after the last rung
    assert weights_of(config) == weights_of(straight)
    assert log_of(config) == log_of(straight)
