"""Numbers that are not finite and memory that runs out, at every place of an update: nothing is updated, or all of it is."""

import json
import math

import pytest
import torch

from stepdistill import stages
from stepdistill.cli import guarded
from stepdistill.config.load import load_config
from stepdistill.errors import NonFiniteError, OutOfMemoryError
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.shared_network import STUDENT
from stepdistill.run.rungs import finished_rungs
from stepdistill.runtime import Runtime
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.optim import RoleOptimizer
from stepdistill.training.painter import Painter
from stepdistill.training.phase import PhaseState, check_result, update
from tests.integration.conftest import tiny_config
from tests.integration.test_phase_state import PHASES, assert_equal, setup_of

PLACES = {
    "the student": (Denoiser, "moved"),
    "the teacher": (Denoiser, "rollout"),
    "the discriminator's logits": (Discriminator, "logits"),
    "the discriminator's features": (Discriminator, "features"),
}
PLACES_OF = {"single": tuple(PLACES), "mse": ("the student", "the teacher")}
CASES = [(name, place) for name, places in PLACES_OF.items() for place in places]


def ready(trained_run, name):
    """(setup, state, runtime) of a phase after one update."""
    setup, runtime = setup_of(load_config(trained_run.run_dir), PHASES[name]), Runtime()
    state = PhaseState(setup, runtime)
    batches = MicroBatches(setup, runtime)
    update(setup, state, batches, runtime)
    return setup, state, runtime, batches


def on_call(monkeypatch, place, number, change):
    """Passes the result of the call with this number, from 0, through `change`; returns a list that grows with the calls."""
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def changed(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(name)
        return change(result) if len(calls) == number + 1 else result

    monkeypatch.setattr(owner, name, changed)
    return calls


def to_nan(result):
    return [part * math.nan for part in result] if isinstance(result, list) else result * math.nan


def destroy(optimizer):
    for parameter in optimizer.weights.parameters.values():
        parameter.data.fill_(1e38)


def run_out(_result):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


ALL = [
    pytest.param(*case, marks=() if case == ("mse", "the teacher") else pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize(("name", "place"), ALL)
def test_nan_from_any_network_stops_before_the_update(trained_run, monkeypatch, name, place):
    setup, state, runtime, batches = ready(trained_run, name)
    before = state.state_dict()
    calls = on_call(monkeypatch, place, 0, to_nan)
    with pytest.raises(NonFiniteError, match=r"step 1: .* nan.*nothing was updated"):
        update(setup, state, batches, runtime)
    assert calls
    assert_equal(state.state_dict(), before)


def test_nan_in_one_gradient_stops_before_the_update(trained_run):
    setup, state, runtime, batches = ready(trained_run, "mse")
    before = state.state_dict()
    parameter = next(iter(setup.student.network.group(STUDENT).values()))
    handle = parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf))
    with pytest.raises(NonFiniteError, match=r"student_grad_norm = (inf|nan)"):
        update(setup, state, batches, runtime)
    handle.remove()
    assert_equal(state.state_dict(), before)


@pytest.mark.parametrize("name", ["mse", "single"])
def test_the_last_update_of_a_phase_is_checked_too(trained_run, name):
    setup, state, runtime, batches = ready(trained_run, name)
    check_result(setup, state, batches, runtime)
    for parameter in setup.student.network.group(STUDENT).values():
        parameter.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match="student_loss"):
        check_result(setup, state, batches, runtime)


@pytest.mark.slow
def test_a_student_destroyed_by_the_last_update_ends_with_code_6_and_no_rung(tmp_path, monkeypatch):
    """After that the finished rungs would be kept, and a lower rate is allowed."""
    phases = [{"objective": "mse", "max_train_steps": 1, "learning_rate": 1e-3}]
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": phases}]
    config = tiny_config(tmp_path, f"ladder={json.dumps(ladder)}")
    stages.prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(RoleOptimizer, "step", destroy)
        assert guarded(lambda: stages.distill(config)) == NonFiniteError.exit_code
    assert finished_rungs(config.run_dir) == []
    lower = load_config(config.run_dir, ["ladder.0.phases.0.learning_rate=1e-4"])
    stages.distill(lower)
    assert finished_rungs(config.run_dir) == [4]


@pytest.mark.parametrize(("name", "place"), ALL)
def test_out_of_memory_at_any_call_repeats_the_update_with_the_same_samples(
    trained_run, monkeypatch, caplog, name, place
):
    """The micro-batches are half as large: the weights differ only by rounding."""
    setup, expected, runtime, batches = ready(trained_run, name)
    update(setup, expected, batches, runtime)
    number = 0
    while True:
        other, state, _, batches = ready(trained_run, name)
        with monkeypatch.context() as patch:
            calls = on_call(patch, place, number, run_out)
            update(other, state, batches, runtime)
        if len(calls) <= number:
            break  # no call with this number
        assert (batches.size, batches.per_update) == (1, 2)
        for parameter, value in state.state_dict()["student"].items():
            torch.testing.assert_close(value, expected.state_dict()["student"][parameter], rtol=0, atol=2e-5)
        number += 1
    assert number
    assert "the update is repeated with 1" in caplog.text


@pytest.mark.slow
def test_after_out_of_memory_with_one_sample_the_same_command_continues_there(tmp_path, monkeypatch, caplog):
    phases = [{"objective": "mse", "max_train_steps": 3, "learning_rate": 1e-3}]
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": phases}]
    config = tiny_config(tmp_path, f"ladder={json.dumps(ladder)}", "training.train_batch_size=1")
    stages.prepare(config)
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        on_call(patch, "the student", 2, run_out)
        assert guarded(lambda: stages.distill(config)) == OutOfMemoryError.exit_code
    stages.distill(load_config(config.run_dir, ["training.gradient_checkpointing=true"]))
    assert "the 4-step rung continues in phase 0 after 2 of 3 updates" in caplog.text
    assert finished_rungs(config.run_dir) == [4]


@pytest.mark.slow
def test_a_preview_that_the_memory_does_not_hold_is_left_out(tmp_path, monkeypatch, caplog):
    phases = [{"objective": "mse", "max_train_steps": 1, "learning_rate": 1e-3}]
    ladder = [{"teacher_steps": 8, "student_steps": 4, "phases": phases}]
    config = tiny_config(tmp_path, f"ladder={json.dumps(ladder)}", "preview.looks_images=2")
    stages.prepare(config)
    monkeypatch.setattr(Painter, "draw", lambda *_args, **_options: run_out(None))
    stages.distill(config)
    assert finished_rungs(config.run_dir) == [4]
    for name in ("phase0-mse-end.png", "phase0-mse-end.json"):
        assert f"out of memory: {name} is not drawn; training goes on" in caplog.text


def test_out_of_memory_with_one_sample_stops_with_code_7_and_the_remedies(trained_run, monkeypatch):
    setup, state, runtime, batches = ready(trained_run, "mse")
    before = state.state_dict()
    monkeypatch.setattr(Denoiser, "moved", lambda *_args: run_out(None))
    with pytest.raises(OutOfMemoryError, match="gradient_checkpointing=true") as stopped:
        update(setup, state, batches, runtime)
    assert stopped.value.exit_code == 7
    assert_equal(state.state_dict(), before)
