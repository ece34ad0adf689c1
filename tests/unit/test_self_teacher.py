"""The student's moving average as its teacher: closed form, and what it answers."""

import dataclasses

import torch

from stepdistill.models.shared_network import STUDENT, TEACHER
from stepdistill.training.self_teacher import SelfTeacher
from tests.unit.test_gradients import make_batch, make_pair


def test_it_is_the_exponential_average_of_the_students_weights(noise_path):
    network = make_pair(noise_path).network
    weights = network.weights(STUDENT)
    start = weights.master.detach().clone()
    teacher = SelfTeacher(network, decay=0.75)
    assert all(torch.equal(t, s) for t, s in pairs(network))
    steps = [torch.full_like(start, value) for value in (1.0, -2.0)]
    for step in steps:
        with torch.no_grad():
            weights.master.add_(step)
        weights.refresh()
        teacher.update()
    first, second = start + steps[0], start + steps[0] + steps[1]
    expected = 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second
    found = network.adapter_state(TEACHER)
    for (name, average), key in zip(weights.views(expected).items(), found, strict=True):
        assert torch.allclose(found[key], average, atol=1e-6), name


def pairs(network):
    return zip(network.adapter_state(TEACHER).values(), network.adapter_state(STUDENT).values(), strict=True)


def test_it_answers_as_the_student_did_at_the_start(noise_path):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    SelfTeacher(pair.network, decay=0.9)
    teacher = dataclasses.replace(pair.student, adapter=TEACHER, trains=False)
    inputs = (batch.noise, batch.timesteps, batch.conditioning)
    student = dataclasses.replace(pair.student, trains=False)  # without gradients, as the teacher
    assert torch.allclose(teacher.output(*inputs), student.output(*inputs), atol=1e-6)
    assert not teacher.output(*inputs).requires_grad


def test_it_continues_from_its_state(noise_path):
    network = make_pair(noise_path).network
    teacher = SelfTeacher(network, decay=0.5)
    state = teacher.state_dict()
    with torch.no_grad():
        network.weights(STUDENT).master.add_(1.0)
    teacher.update()
    moved = network.adapter_state(TEACHER)
    teacher.load_state_dict(state)
    restored = network.adapter_state(TEACHER)
    assert all(torch.equal(t, s) for t, s in zip(restored.values(), network_start(noise_path), strict=True))
    assert any(not torch.equal(restored[key], moved[key]) for key in moved)


def network_start(noise_path):
    return make_pair(noise_path).network.adapter_state(STUDENT).values()
