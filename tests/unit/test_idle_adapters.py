"""An adapter that is not used waits on the CPU; modules whose activations are kept give the same gradients to the bit."""

import pytest
import torch

from stepdistill.models.adapters import adapter_parameters
from stepdistill.models.shared_network import STUDENT, TEACHER
from tests.conftest import make_conditioning, randn
from tests.unit.test_gradients import fill, make_network

INPUTS = (randn(2, 4, 8, 8), torch.tensor([999, 9]), make_conditioning(2))


def devices(network, name):
    return {p.device.type for p in adapter_parameters(network.model, name).values()}


def test_a_parked_adapter_comes_back_when_it_is_used(monkeypatch):
    """Each move between devices is recorded, because on a machine without a GPU both are the CPU."""
    network = make_network()
    fill(network, TEACHER, 200)
    state = network.adapter_state(TEACHER)
    with torch.no_grad(), network.using(TEACHER):
        expected = network.ask(*INPUTS)
    moved = []
    move = network._move
    monkeypatch.setattr(
        network, "_move", lambda name, device: moved.append((name, device.type)) or move(name, device)
    )
    network.park(TEACHER)
    with torch.no_grad(), network.using(STUDENT):
        network.ask(*INPUTS)
    assert moved == [(TEACHER, "cpu")]
    with torch.no_grad(), network.using(TEACHER):
        assert torch.equal(network.ask(*INPUTS), expected)
    with network.using(TEACHER):
        pass
    assert moved == [(TEACHER, "cpu"), (TEACHER, network.device.type)]
    assert all(torch.equal(network.adapter_state(TEACHER)[key], state[key]) for key in state)


def test_a_parked_adapter_can_be_loaded(monkeypatch):
    network = make_network()
    network.park(TEACHER)
    state = fill(network, TEACHER, 300)
    assert devices(network, TEACHER) == {"cpu"}
    with network.using(TEACHER):
        assert all(torch.equal(network.adapter_state(TEACHER)[key], state[key]) for key in state)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kept_activations_change_no_gradient(share):
    network = make_network(checkpointing=True)
    fill(network, STUDENT, 100)
    calls = []
    original = network.checkpointed

    def spied(module, *args):
        calls.append(module)
        return original(module, *args)

    def gradients():
        with network.using(STUDENT):
            network.ask(*INPUTS).square().sum().backward()
        found = [p.grad.clone() for p in network.group(STUDENT).values()]
        for parameter in network.group(STUDENT).values():
            parameter.grad = None
        return found

    expected = gradients()
    network.model.enable_gradient_checkpointing(spied)
    gradients()
    names = {module: name for name, module in network.model.named_modules()}
    segments = [names[module] for module in calls]
    assert len(segments) > 4
    network.keep_activations(segments[: round(share * len(segments))])
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
