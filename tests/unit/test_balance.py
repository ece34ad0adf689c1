"""Weights of objectives over a phase, and their balance: each objective has its share of the student's gradient."""

import pytest
import torch

from stepdistill.config import Phase
from stepdistill.models.shared_network import STUDENT
from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.runtime import Runtime
from stepdistill.training.balance import MEASURED_EVERY, GradientBalance
from stepdistill.training.optim import RoleOptimizer
from stepdistill.training.phase import losses_and_gradients
from stepdistill.training.samples import Samples
from tests.unit.test_gradients import make_batch, make_discriminator, make_pair

TWO = ({"kind": "mse"}, {"kind": "single", "weight": 0.5})


def phase_of(*objectives, **options):
    return Phase(objectives=objectives, **{"balance": "gradient", "max_train_steps": 21} | options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [1.0, 0.853553, 0.5, 0.146447, 0.0])],
)
def test_a_weight_goes_from_its_first_to_its_final_value(schedule, expected):
    phase = phase_of(
        {"kind": "mse"}, {"kind": "single", "final_weight": 0.0, "schedule": schedule}, max_train_steps=5
    )
    assert [phase.weights_at(step)["single"] for step in range(5)] == pytest.approx(expected, abs=1e-6)
    assert {phase.weights_at(step)["mse"] for step in range(5)} == {1.0}


def test_a_phase_of_one_update_has_the_first_weight():
    phase = phase_of({"kind": "mse"}, {"kind": "single", "final_weight": 0.0}, max_train_steps=1)
    assert phase.weights_at(0) == {"mse": 1.0, "single": 1.0}


class Gradients:
    """A balance whose objectives have these gradients of four parameters."""

    def __init__(self, phase):
        weights = TrainedWeights({"w": torch.nn.Parameter(torch.zeros(4))})
        self.master = weights.master
        self.master.grad = torch.zeros_like(self.master)
        self.balance, self.runtime = GradientBalance(phase, weights), Runtime()

    def measure(self, step, **gradients):
        self.balance.begin()
        self.master.grad.zero_()
        for kind, gradient in gradients.items():
            self.master.grad[:4] += torch.tensor(gradient)
            self.balance.collect(kind)
        norms = self.balance.combine(step, self.runtime)
        return norms, self.master.grad[:4]


def test_the_gradients_of_all_objectives_have_norms_in_proportion_to_their_weights():
    gradients = Gradients(phase_of(*TWO))
    norms, combined = gradients.measure(0, mse=[3.0, 0, 0, 0], single=[0, 0, 0, 40.0])
    assert norms["mse_grad_norm"] == 3.0
    assert norms["single_grad_norm"] == 40.0
    assert torch.allclose(combined, torch.tensor([3.0, 0, 0, 1.5]))  # 1.5 is half of 3
    factors = gradients.balance.factors(1)
    assert (float(factors["mse"]), float(factors["single"])) == pytest.approx((1.0, 0.5 * 3 / 40))


def test_new_norms_are_averaged_with_earlier_ones():
    gradients = Gradients(phase_of(*TWO))
    gradients.measure(0, mse=[1.0, 0, 0, 0], single=[0, 1.0, 0, 0])
    gradients.measure(10, mse=[1.0, 0, 0, 0], single=[0, 3.0, 0, 0])
    assert float(gradients.balance.factors(11)["single"]) == pytest.approx(0.5 / 2.0)


def test_the_balance_follows_the_schedule_of_the_weights():
    gradients = Gradients(
        phase_of({"kind": "mse"}, {"kind": "single", "final_weight": 3.0}, max_train_steps=21)
    )
    gradients.measure(0, mse=[1.0, 0, 0, 0], single=[0, 2.0, 0, 0])
    assert float(gradients.balance.factors(10)["single"]) == pytest.approx(2.0 / 2.0)


@pytest.mark.parametrize("norm", [0.0, float("inf")])
def test_a_gradient_without_a_usable_norm_keeps_its_weight(norm):
    gradients = Gradients(phase_of(*TWO))
    gradients.measure(0, mse=[1.0, 0, 0, 0], single=[0, norm, 0, 0])
    assert {kind: float(of) for kind, of in gradients.balance.factors(1).items()} == {
        "mse": 1.0,
        "single": 0.5,
    }
    gradients.measure(10, mse=[1.0, 0, 0, 0], single=[0, 4.0, 0, 0])
    assert float(gradients.balance.factors(11)["single"]) == pytest.approx(0.5 / 4.0)


def test_norms_are_measured_on_every_tenth_update():
    balance = Gradients(phase_of(*TWO)).balance
    assert [step for step in range(25) if balance.measures(step)] == [0, MEASURED_EVERY, 2 * MEASURED_EVERY]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_measuring_update_has_the_gradient_of_the_weighted_sum(noise_path, checkpointing):
    """One backward pass per objective, then added: the same gradient as one backward pass with these factors."""
    phase, found = phase_of(*TWO), {}
    factors = None
    for measures in (True, False):
        pair = make_pair(noise_path, checkpointing=checkpointing)
        discriminator = make_discriminator(pair.network, paired=False)
        weights = pair.network.weights(STUDENT)
        options = {"learning_rate": 1e-3, "adversarial": True, "max_train_steps": 9}
        optimizer = RoleOptimizer(weights, **options, lr_warmup_steps=0, lr_final_fraction=1.0)
        samples = Samples(
            make_batch(noise_path), student=pair.student, teacher=pair.teacher, discriminator=discriminator
        )
        balance = GradientBalance(phase, weights)
        balance.begin()
        after_each = balance.collect if measures else None
        losses_and_gradients(samples, phase, torch.Tensor.backward, weights=factors, after_each=after_each)
        if measures:
            balance.combine(0, Runtime())
            factors = balance.factors(0)
        found[measures] = weights.master.grad.clone()
        optimizer.close()
    assert float(factors["single"]) != 0.5
    assert found[True].norm() > 0
    assert torch.allclose(found[True], found[False], rtol=1e-4, atol=1e-6 * float(found[True].abs().max()))
