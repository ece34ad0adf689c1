"""Trackers get every update and preview; a missing or failing one does not cost a training."""

import importlib.util
import json
import socket

import pytest
from PIL import Image

from stepdistill.cli import guarded
from stepdistill.config import ConfigError
from stepdistill.config.installed import check_installed
from stepdistill.data.prepare import prepare
from stepdistill.ladder import distill
from stepdistill.run.log import read_log
from stepdistill.stages import check_run
from stepdistill.training.trackers import _KINDS, Trackers
from tests.integration.conftest import tiny_config

PHASES = [{"objective": "mse", "max_train_steps": 3}, {"objective": "single", "max_train_steps": 2}]
LADDER = json.dumps(
    [
        {"teacher_steps": 4, "student_steps": 2, "phases": PHASES},
        {"teacher_steps": 2, "student_steps": 1, "phases": PHASES[:1]},
    ]
)


def config_of(tmp_path, *options):
    return tiny_config(
        tmp_path, f"ladder={LADDER}", "training.train_batch_size=2", "preview.looks_images=0", *options
    )


class Recorder:
    """A tracker that remembers what it gets."""

    def __init__(self):
        self.numbers, self.images, self.settings, self.ended = {}, [], {}, False

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        assert step not in self.numbers
        self.numbers[step] = values

    def log_images(self, values, step, **_options):
        self.images.append((step, values["preview"].shape))

    def finish(self):
        self.ended = True


@pytest.mark.slow
def test_every_update_and_every_preview_is_tracked(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(_KINDS, "tensorboard", lambda _config, _folder: recorder)
    config = config_of(tmp_path, "training.trackers=[tensorboard]", "training.preview_steps=2")
    prepare(config)
    assert distill(config) == [2, 1]
    lines = read_log(config.run_dir / "log.jsonl")
    assert list(recorder.numbers) == list(range(1, 9))
    for line, numbers in zip(lines, recorder.numbers.values(), strict=True):
        assert {name: line[name] for name in numbers} == numbers
    assert {"student_loss", "student_grad_norm", "student_lr"} <= recorder.numbers[1].keys()
    assert "discriminator_accuracy_real" in recorder.numbers[4]
    # after 2 updates of a phase of 3, and at each phase's end; not twice at the end of a phase of 2
    assert [step for step, _ in recorder.images] == [2, 3, 5, 7, 8]
    assert recorder.images[0][1][0] == 1
    assert recorder.settings["training.train_batch_size"] == 2
    assert recorder.ended


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_other_trackers_take_numbers_and_images(tmp_path, monkeypatch, caplog, name):
    """Offline and without an account."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = config_of(tmp_path, f"training.trackers=[{name}]")
    trackers = Trackers(config)
    trackers.log(2, 0, 1, {"student_loss": 1.0})
    Image.new("RGB", (8, 8)).save(tmp_path / "preview.png")
    trackers.image(2, 0, 1, tmp_path / "preview.png")
    trackers.close()
    assert "failed" not in caplog.text


@pytest.mark.slow
def test_tensorboard_files_hold_the_losses_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, "training.trackers=[tensorboard]")
    prepare(config)
    distill(config)
    folder = config.run_dir / "trackers" / config.name
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = events.Scalars("student_loss")
    assert [event.step for event in losses] == list(range(1, 9))
    expected = [line["student_loss"] for line in read_log(config.run_dir / "log.jsonl")]
    assert [event.value for event in losses] == pytest.approx(expected)
    assert [event.step for event in events.Images("preview")] == [3, 5, 8]


def test_a_failing_tracker_is_named_and_left_out(tmp_path, monkeypatch, caplog):
    class Failing(Recorder):
        def log(self, values, step):
            if step == 2:
                raise ConnectionError("no network\nsecond line")
            super().log(values, step)

    failing, working = Failing(), Recorder()
    monkeypatch.setitem(_KINDS, "wandb", lambda _config, _folder: failing)
    monkeypatch.setitem(_KINDS, "trackio", lambda _config, _folder: working)
    config = config_of(tmp_path)
    training = config.training.model_copy(update={"trackers": ("wandb", "trackio")})
    trackers = Trackers(config.model_copy(update={"training": training}))
    for step in (1, 2, 3):
        trackers.log(2, 0, step, {"student_loss": 1.0})
    trackers.close()
    assert list(failing.numbers) == [1]
    assert list(working.numbers) == [1, 2, 3]
    assert caplog.text.count("the tracker wandb failed and is left out: ConnectionError: no network") == 1


@pytest.mark.parametrize(
    ("option", "package", "message"),
    [
        ("training.trackers=[tensorboard]", "tensorboard", r'pip install "stepdistill\[trackers\]"'),
        ("training.trackers=[trackio]", "trackio", "pip install trackio"),
        ("training.optimizer=prodigy", "prodigyopt", r'pip install "stepdistill\[prodigy\]"'),
        ("training.optimizer=adam8bit", "torchao", r'pip install "stepdistill\[quantize\]"'),
        ("training.base_quantization=fp8", "torchao", r'pip install "stepdistill\[quantize\]"'),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path, monkeypatch, option, package, message
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    config = config_of(tmp_path, option)
    with pytest.raises(ConfigError, match=rf"got \w+, which needs the package {package}; fix: {message}"):
        check_run(config)
    assert guarded(lambda: check_run(config)) == 2
    assert not config.run_dir.exists()


@pytest.mark.parametrize("option", ["training.compile=true", "training.optimizer=adam8bit"])
def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch, option):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler; fix: install g\+\+ or set CXX"):
        check_installed(config_of(tmp_path, option))


def test_wandb_without_an_account_is_refused_and_offline_it_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = config_of(tmp_path, "training.trackers=[wandb]")
    with pytest.raises(
        ConfigError, match=r"wandb, which has no account here; fix: `wandb login`, or WANDB_MODE=offline"
    ):
        check_installed(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_installed(config)


def test_wandb_whose_server_cannot_be_reached_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    config = config_of(tmp_path, "training.trackers=[wandb]")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        check_installed(config)
    assert guarded(lambda: check_installed(config)) == 2
    with pytest.raises(ConfigError, match=r"wandb, which cannot reach 127\.0\.0\.1; fix: WANDB_MODE=offline"):
        check_installed(config)


def test_a_compiler_that_torch_does_not_take_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    fix = r"needs a C\+\+ compiler; fix: CXX names /nonexistent/c\+\+, which cannot be run; unset it"
    with pytest.raises(ConfigError, match=rf"training\.compile: got true, which {fix}"):
        check_installed(config_of(tmp_path, "training.compile=true"))
