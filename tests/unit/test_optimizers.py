"""The optimisers by name: each resumes bit for bit, takes the schedule's rate, and equals its library's own update."""

import copy
import shutil

import pytest
import torch

from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.training.optim import OPTIMIZERS, RoleOptimizer

COMPILED = pytest.param(
    "adam8bit",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="torchao's optimiser needs a compiler"),
    ],
)
KINDS = ["adam", "adamw", "prodigy", COMPILED]


def weights_of(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"a": (96, 64), "b": (7,), "c": (33,)}
    return TrainedWeights({n: torch.nn.Parameter(torch.randn(s)) for n, s in shapes.items()}, dtype=dtype)


def optimizer_of(kind, weights):
    if kind == "prodigy":
        pytest.importorskip("prodigyopt")
    if kind == "adam8bit":
        pytest.importorskip("torchao")
    rate = 1.0 if kind == "prodigy" else 1e-2
    settings = {"adversarial": True, "max_train_steps": 20, "lr_warmup_steps": 2, "lr_final_fraction": 0.1}
    return RoleOptimizer(weights, learning_rate=rate, kind=kind, **settings)


def update(optimizer, step):
    """One update on the gradient of a loss that depends on the weights and on the step."""
    total = torch.zeros(())
    for name, parameter in optimizer.weights.parameters.items():
        target = torch.sin(torch.arange(parameter.numel()) * (step + len(name))).view(parameter.shape)
        total = total + (parameter.float() - target).square().mean()
    total.backward()
    optimizer.clip(1.0)
    optimizer.step()
    return float(total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow_after_first
def test_a_stopped_and_resumed_optimiser_gives_the_same_weights_to_the_bit(kind, dtype):
    straight = weights_of(dtype)
    optimizer = optimizer_of(kind, straight)
    losses = [update(optimizer, step) for step in range(6)]
    state, masters = copy.deepcopy(optimizer.state_dict()), straight.master.detach().clone()
    losses += [update(optimizer, step) for step in range(6, 10)]
    assert losses[-1] < losses[0]

    resumed = weights_of(dtype)
    with torch.no_grad():
        resumed.master.copy_(masters)
    resumed.refresh()
    second = optimizer_of(kind, resumed)
    second.load_state_dict(state)
    assert torch.equal(resumed.master, masters)
    for step in range(6, 10):
        assert second.learning_rate == optimizer_of_step(kind, step)
        update(second, step)
    assert torch.equal(resumed.master, straight.master)
    assert all(torch.equal(a, straight.parameters[n]) for n, a in resumed.parameters.items())


def optimizer_of_step(kind, step):
    optimizer = optimizer_of(kind, weights_of())
    for _ in range(step):
        optimizer.updates += 1
    return optimizer.learning_rate


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_kind_is_refused(kind):
    other = "prodigy" if kind != "prodigy" else "adam"
    first = optimizer_of(kind, weights_of())
    update(first, 0)
    with pytest.raises(ValueError, match=r"the optimiser's state has .*; here it has"):
        optimizer_of(other, weights_of()).load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", [COMPILED])
def test_moments_in_8_bits_take_a_quarter_and_follow_adam(kind):
    sizes, masters = {}, {}
    for name in ("adam", kind):
        weights = weights_of()
        optimizer = optimizer_of(name, weights)
        for step in range(10):
            update(optimizer, step)
        sizes[name] = sum(t.numel() * t.itemsize for t in optimizer.tensors())
        masters[name] = weights.master.detach()
    table = 2 * 256 * 4
    assert sizes[kind] - table < 0.27 * sizes["adam"]
    moved = (masters["adam"] - weights_of().master).norm()
    assert (masters["adam"] - masters[kind]).norm() < 0.1 * moved


def test_adamw_decays_the_weights_and_adam_does_not():
    for kind, expected in (("adam", 1.0), ("adamw", 1 - 1e-2 * 0.01 / 3)):
        weights = weights_of()
        before = weights.master.detach().clone()
        optimizer_of(kind, weights).step()
        assert torch.allclose(weights.master, before * expected, rtol=1e-6)


def test_every_name_of_the_config_has_an_optimiser():
    from stepdistill.config.sections import Training

    assert set(Training.model_fields["optimizer"].annotation.__args__) == set(OPTIMIZERS)
