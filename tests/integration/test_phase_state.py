"""A phase that is stopped between two updates and resumed from its state gives the same result as an uninterrupted one."""

import dataclasses

import pytest
import torch

from stepdistill.config import DiscriminatorOptions, Phase, Rung
from stepdistill.config.load import load_config
from stepdistill.ladder import load_shared
from stepdistill.models.discriminator import build_discriminator
from stepdistill.models.shared_network import STUDENT, TEACHER
from stepdistill.runtime import Runtime
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase import PhaseState, update
from stepdistill.training.phase_setup import PhaseSetup
from tests.integration.conftest import student_of

UPDATES = 4
PHASES = {
    "mse": Phase(objective="mse", max_train_steps=UPDATES),
    "cached": Phase(objective="mse", max_train_steps=UPDATES, cached_updates=2),
    "convert": Phase(objective="convert", max_train_steps=UPDATES),
    "frozen trunk": Phase(
        objective="single",
        max_train_steps=UPDATES,
        discriminator=DiscriminatorOptions(trunk="frozen", heads="multi"),
    ),
    "single": Phase(objective="single", max_train_steps=UPDATES),
    "several": Phase(
        objectives=({"kind": "mse"}, {"kind": "single", "weight": 0.1}), max_train_steps=UPDATES
    ),
    "balanced": Phase(
        objectives=({"kind": "mse"}, {"kind": "single", "weight": 0.1, "final_weight": 0.5}),
        balance="gradient",
        max_train_steps=UPDATES,
    ),
    "features": Phase(
        objectives=(
            {"kind": "mse"},
            {"kind": "l2", "taps": ("encoder", "middle", "decoder")},
            {"kind": "relations", "weight": 0.5},
        ),
        max_train_steps=UPDATES,
    ),
    "self-distilled": Phase(objective="mse", teacher="ema", teacher_decay=0.5, max_train_steps=UPDATES),
    "full trunk": Phase(
        objective="paired", max_train_steps=UPDATES, discriminator=DiscriminatorOptions(trunk="full")
    ),
}


def setup_of(config, phase, precision="no"):
    """The phase on a separate network, as the ladder sets it up."""
    shared = load_shared(config, Runtime(mixed_precision=precision))
    student = dataclasses.replace(
        student_of(shared), prediction_type="sample" if phase.kinds == ("convert",) else "epsilon"
    )
    training = config.training.model_copy(update={"ema_decay": 0.5, "train_batch_size": 2})
    discriminator = build_discriminator(
        shared.network, phase, base=shared.base, rank=4, seed=3, sample_size=shared.cache.smallest_side
    )
    return PhaseSetup(
        rung=Rung(teacher_steps=4, student_steps=2, phases=(phase,)),
        phase=phase,
        number=0,
        training=training,
        seed=7,
        student=student,
        teacher=dataclasses.replace(student, adapter=TEACHER, trains=False)
        if phase.teacher == "ema"
        else shared.undistilled,
        discriminator=discriminator,
        cache=shared.cache,
        preview=lambda name: None,
    )


def shapes_of(saved):
    return saved["optimizers"][STUDENT]["shapes"]


def train_until(setup, state, runtime, last):
    batches = MicroBatches(setup, runtime, first_step=state.step)
    while state.step < last:
        update(setup, state, batches, runtime)
    batches.close()


def test_a_resumed_float16_phase_keeps_its_loss_scale(trained_run):
    config, phase = load_config(trained_run.run_dir), PHASES["mse"]
    first, second = Runtime(mixed_precision="fp16"), Runtime(mixed_precision="fp16")
    state = PhaseState(setup_of(config, phase), first)
    scaler = first.loss_scale_state()
    first.load_loss_scale_state(scaler | {"scale": 64.0, "_growth_tracker": 7})
    other = PhaseState(setup_of(config, phase), second)
    assert second.loss_scale_state() != first.loss_scale_state()
    other.load_state_dict(state.state_dict())
    assert second.loss_scale_state() == first.loss_scale_state()


def test_a_state_of_another_phase_is_refused_before_anything_is_loaded(trained_run):
    config, runtime = load_config(trained_run.run_dir), Runtime()
    states = {name: PhaseState(setup_of(config, PHASES[name]), runtime) for name in ("mse", "single")}
    before = states["mse"].state_dict()
    with pytest.raises(
        ValueError, match="the phase's state has discriminator: it belongs to a phase with other settings"
    ):
        states["mse"].load_state_dict(states["single"].state_dict())
    assert_equal(states["mse"].state_dict(), before)
    lacking = states["single"].state_dict()
    del lacking["optimizers"]["discriminator"]
    with pytest.raises(ValueError, match=r"optimisers for student, this phase needs student, discriminator"):
        states["single"].load_state_dict(lacking)


def assert_equal(ours, theirs, place="state"):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key, value in ours.items():
            assert_equal(value, theirs[key], f"{place}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), place
        for k, value in enumerate(ours):
            assert_equal(value, theirs[k], f"{place}.{k}")
    else:
        assert ours == theirs, place


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cached", "no"),
        ("several", "no"),
        ("full trunk", "no"),
        *(
            pytest.param(name, "no", marks=pytest.mark.slow)
            for name in ("mse", "single", "convert", "frozen trunk")
        ),
        pytest.param("single", "fp16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow_after_first
def test_a_phase_stopped_and_resumed_is_bit_identical(trained_run, name, precision):
    """The whole state: student, discriminator, both optimisers, average, loss scale, guard."""
    config, phase = load_config(trained_run.run_dir), PHASES[name]
    runtime = Runtime(mixed_precision=precision)
    straight = setup_of(config, phase, precision)
    uninterrupted = PhaseState(straight, runtime)
    train_until(straight, uninterrupted, runtime, UPDATES // 2)
    halfway = uninterrupted.state_dict()
    train_until(straight, uninterrupted, runtime, UPDATES)
    other = setup_of(config, phase, precision)
    second = PhaseState(other, runtime)
    second.load_state_dict(halfway)
    assert second.step == UPDATES // 2
    assert_equal(second.state_dict(), halfway)
    train_until(other, second, runtime, UPDATES)
    assert_equal(second.state_dict(), uninterrupted.state_dict())
    moved = uninterrupted.state_dict()["student"]
    assert any(not torch.equal(value, halfway["student"][key]) for key, value in moved.items())


def test_a_state_of_other_parameters_is_refused(trained_run):
    config, runtime = load_config(trained_run.run_dir), Runtime()
    setup = setup_of(config, PHASES["single"])
    state = PhaseState(setup, runtime)
    train_until(setup, state, runtime, 1)
    changes = {
        "the optimiser's state lacks": lambda saved: shapes_of(saved).pop(next(iter(shapes_of(saved)))),
        "the optimiser's state has other": lambda saved: shapes_of(saved).update(other=[1]),
        r"in shape \(1, 2, 3\)": lambda saved: shapes_of(saved).update(
            {next(iter(shapes_of(saved))): [1, 2, 3]}
        ),
        "the moving average lacks": lambda saved: saved["average"]["parameters"].popitem(),
        "other heads does not fit": lambda saved: saved["discriminator"]["heads"].popitem(),
        "LoRA does not fit": lambda saved: saved["student"].popitem(),
    }
    for message, change in changes.items():
        saved = state.state_dict()
        change(saved)
        with pytest.raises(ValueError, match=message):
            state.load_state_dict(saved)
