"""The guard of an adversarial phase: what it notices, and training that goes back to a checkpoint because of it."""

import dataclasses
import json
import shutil

import pytest

from stepdistill import stages
from stepdistill.config import Phase
from stepdistill.config.load import load_config
from stepdistill.errors import CheckpointError
from stepdistill.ladder import phases
from stepdistill.models.shared_network import STUDENT, TEACHER
from stepdistill.run.checkpoint_files import CHECKPOINTS, STATE, checkpoint_name, partial_rung
from stepdistill.run.log import read_log
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import Runtime
from stepdistill.training import guard as guard_module
from stepdistill.training.guard import CERTAIN, FAR, HORIZON, LONG, AdversaryGuard
from stepdistill.training.phase import PhaseState, copied, run_phase
from tests.integration.conftest import tiny_config
from tests.integration.test_phase_state import assert_equal, setup_of, train_until

EVERY = 50
SINGLE = Phase(objective="single", max_train_steps=1000, learning_rate=1e-3)


def numbers(real, student):
    return {"discriminator_accuracy_real": real, "discriminator_accuracy_student": student}


@pytest.fixture(scope="module")
def setup(trained_run):
    """An adversarial phase on a tiny network."""
    setup = setup_of(load_config(trained_run.run_dir), SINGLE)
    return dataclasses.replace(setup, training=setup.training.model_copy(update={"train_batch_size": 16}))


@pytest.fixture
def watched(setup, monkeypatch):
    """A guard with the distance measured, which measures it again every 50 updates."""
    monkeypatch.setattr(guard_module, "EVERY", EVERY)
    guard = AdversaryGuard(setup, Runtime())
    guard.begin()
    return guard


def first_trouble(guard, accuracies, *, updates):
    """(update, kind) of the first trouble; None if there is none."""
    for step in range(1, updates + 1):
        trouble = guard.watch(step, numbers(*accuracies))
        if trouble is not None:
            return step, trouble.kind
    return None


def test_the_teachers_lora_is_put_away_again_after_a_resumed_guard_has_asked_it(trained_run, monkeypatch):
    """Its phase's losses do not need the teacher; a resumed guard has no samples of it yet."""
    monkeypatch.setattr(guard_module, "EVERY", 2)
    phase = Phase(objective="single", max_train_steps=4, discriminator={"real": "data"})
    setup, runtime = setup_of(load_config(trained_run.run_dir), phase), Runtime()
    setup = dataclasses.replace(
        setup,
        teacher=dataclasses.replace(setup.teacher, adapter=TEACHER, guidance_scale=1.0),
        preview=lambda _name, _step: None,
    )
    state = PhaseState(setup, runtime)
    state.guard.begin()
    train_until(setup, state, runtime, 1)
    saved = copied(state.state_dict())
    state.close()
    network, used = setup.student.network, []
    using = network.using
    monkeypatch.setattr(network, "using", lambda name, **options: used.append(name) or using(name, **options))
    run_phase(setup, runtime=runtime, log=None, start=saved)
    assert TEACHER in used
    assert network._parked == {TEACHER}


def test_a_discriminator_that_is_nearly_always_right_is_noticed_after_the_horizon(watched):
    assert first_trouble(watched, (1.0, 1.0), updates=400) == (HORIZON, "certain")
    assert watched.good_step == HORIZON - EVERY


def test_a_discriminator_at_chance_is_noticed_only_after_long(watched):
    assert first_trouble(watched, (0.48, 0.53), updates=400) == (LONG, "at chance")


@pytest.mark.parametrize("accuracies", [(0.7, 0.8), (1.0, 0.0), (CERTAIN - 0.01, 1.0), (0.4, 0.6)])
@pytest.mark.slow_after_first
def test_a_discriminator_that_teaches_is_left_alone(watched, accuracies):
    assert first_trouble(watched, accuracies, updates=400) is None
    assert watched.good_step == 400


def test_the_distance_grows_when_the_student_leaves_its_teacher(watched, setup):
    """The student's new LoRA changes nothing, but the teacher is guided, so the distance to it is above zero."""
    before = watched.distance()
    assert before > 0
    assert watched.distance() == before
    shifted = numbers(0.7, 0.7)
    parameters = setup.student.network.group(STUDENT).values()
    former = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.add_(0.02)
    assert watched.watch(EVERY - 1, dict(shifted)) is None
    trouble = watched.watch(EVERY, shifted)
    assert shifted["distance_to_teacher"] > FAR * before
    assert (trouble.kind, trouble.ends_with_rewind) == ("far", True)
    assert f"{shifted['distance_to_teacher'] / before:.1f} times" in trouble.text
    for parameter, value in zip(parameters, former, strict=True):
        parameter.data.copy_(value)


@pytest.mark.slow
def test_the_guard_continues_from_its_state_and_changes_no_weight(trained_run):
    config, runtime = load_config(trained_run.run_dir), Runtime()
    phase = SINGLE.model_copy(update={"max_train_steps": 4})
    first, second = (setup_of(config, phase) for _ in range(2))
    with_guard, without = PhaseState(first, runtime), PhaseState(second, runtime)
    with_guard.guard.begin()
    with_guard.guard.watch(guard_module.EVERY, numbers(0.9, 0.6))
    train_until(first, with_guard, runtime, 2)
    train_until(second, without, runtime, 2)
    assert_equal(with_guard.state_dict()["student"], without.state_dict()["student"])
    other = PhaseState(setup_of(config, phase), runtime)
    other.load_state_dict(with_guard.state_dict())
    assert other.guard.state_dict() == with_guard.guard.state_dict()
    assert other.guard.state_dict()["good_step"] == guard_module.EVERY


def config_of(folder, *overrides, rate=1e-3, updates=6):
    """8 -> 4 by mse, then single; the discriminator has the rate 1e-4."""
    single = {"objective": "single", "max_train_steps": updates, "learning_rate": rate}
    phases = [
        {"objective": "mse", "max_train_steps": 3, "learning_rate": 1e-3},
        single | {"discriminator": {"learning_rate": 1e-4}},
    ]
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": phases}]
    return tiny_config(folder, f"ladder={json.dumps(ladder)}", *overrides)


@pytest.mark.slow
def test_training_goes_back_with_half_the_discriminators_rate_and_logs_no_update_twice(
    tmp_path, monkeypatch, caplog
):
    """The student's rate is so high that each attempt diverges; after the fourth, training goes on with warnings."""
    monkeypatch.setattr(guard_module, "EVERY", 2)
    monkeypatch.setattr(guard_module, "FAR", 1.0 + 1e-6)
    config = config_of(tmp_path, "training.guard=rewind", rate=0.05)
    stages.prepare(config)
    caplog.set_level("INFO")
    stages.distill(config)
    lines = [line for line in read_log(config.run_dir / "log.jsonl") if line["phase"] == 1]
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[0]["discriminator_lr"] == pytest.approx(1e-4 / 16)
    for scale in ("0.5", "0.25", "0.125", "0.0625"):
        assert f"back to update 0 of phase 1, with {scale} times" in caplog.text
    assert caplog.text.count("back to update") == 4
    assert "times what it was at the phase's start" in caplog.text
    assert rung_folder(config.run_dir, 4).is_dir()
    assert not partial_rung(config.run_dir, 4).exists()


@pytest.mark.slow
def test_without_an_intact_checkpoint_of_the_phase_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "EVERY", 2)
    monkeypatch.setattr(guard_module, "FAR", 1.0 + 1e-6)
    words = ("training.guard=rewind", "training.checkpoint={every_minutes: 0, keep: 9}")
    config = config_of(tmp_path, *words, rate=0.05)
    stages.prepare(config)
    folder = partial_rung(config.run_dir, 4) / CHECKPOINTS
    rewound = phases.RungTraining._rewound

    def damaged(training, diverged):
        training.checkpoints.wait()
        (folder / checkpoint_name(1, 0) / STATE).write_bytes(b"")
        return rewound(training, diverged)

    monkeypatch.setattr(phases.RungTraining, "_rewound", damaged)
    with pytest.raises(
        CheckpointError, match=r"phase 1 diverged, and .* has no intact checkpoint of it to go back to"
    ):
        stages.distill(config)
    steps = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert sorted(path.name for path in folder.iterdir())[1:] == [checkpoint_name(*place) for place in steps]


@pytest.mark.slow
def test_with_warn_the_same_training_warns_once_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guard_module, "EVERY", 2)
    monkeypatch.setattr(guard_module, "FAR", 1.0 + 1e-6)
    config = config_of(tmp_path, rate=0.05)
    stages.prepare(config)
    stages.distill(config)
    assert caplog.text.count("times what it was at the phase's start") == 1
    assert "back to update" not in caplog.text
    lines = [line for line in read_log(config.run_dir / "log.jsonl") if line["phase"] == 1]
    assert {line["discriminator_lr"] for line in lines[:1]} == {1e-4}
    assert ["distance_to_teacher" in line for line in lines] == [False, True] * 3


@pytest.mark.slow
def test_a_rewound_phase_that_is_killed_continues_with_the_lower_rate(tmp_path, monkeypatch, caplog):
    """From a checkpoint after the rewind; the result equals that of the run that was not killed."""
    monkeypatch.setattr(guard_module, "EVERY", 2)
    monkeypatch.setattr(guard_module, "FAR", 1.0 + 1e-6)
    words = ("training.guard=rewind", "training.checkpoint={every_minutes: 0, keep: 3}")
    straight = config_of(tmp_path / "a", *words, rate=0.05)
    stages.prepare(straight)
    stopped = config_of(tmp_path / "b", *words, "training.max_minutes=1e-9", rate=0.05)
    shutil.copytree(straight.run_dir, stopped.run_dir)
    stages.distill(straight)
    codes = []
    while not rung_folder(stopped.run_dir, 4).is_dir():
        try:
            stages.distill(stopped)
        except Exception as stop:
            codes.append(stop.exit_code)
    assert len(codes) >= 9
    assert set(codes) == {75}
    weights = [(rung_folder(c.run_dir, 4) / "pytorch_lora_weights.safetensors") for c in (straight, stopped)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
