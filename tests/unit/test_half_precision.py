"""A base in half precision under autocast: no copies that change nothing, and logits of D that keep their differences."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.models import adapters
from stepdistill.models.discriminator import Head
from stepdistill.training.steps import adversarial_step, mse_step
from tests.conftest import make_conditioning, randn
from tests.unit.test_roles import grads, make_batch, make_discriminator, make_nets


def as_peft_does(self, x, dtype):
    """peft's default: the input in the dtype of the adapter's weights."""
    return None if x is None else x.to(dtype)


class Copies(TorchDispatchMode):
    """Counts copies into float32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32:
            self.count += 1
        return func(*args, **(kwargs or {}))


def in_dtype(schedule, dtype, *, checkpointing=False):
    """Roles, D and a batch on a base in that dtype; what trains is float32."""
    nets = make_nets(schedule, checkpointing=checkpointing)
    discriminator = make_discriminator(nets, heads="multi")
    for name, parameter in nets.roles.unet.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return nets, discriminator, make_batch()


def losses_and_gradients(schedule, dtype, checkpointing):
    nets, discriminator, batch = in_dtype(schedule, dtype, checkpointing=checkpointing)
    trained = [*nets.roles.student_parameters, *nets.roles.discriminator_parameters]
    seen = []
    options = {"teacher_steps": 8, "perturbation_weights": [1, 1, 1, 1], "loss": "relativistic"}
    for step in (
        lambda: mse_step(nets, batch, teacher_steps=8, loss_space="prev_sample"),
        lambda: adversarial_step(nets, discriminator, batch, **options),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            losses = step().losses
        for loss in losses.values():
            loss.backward()
        seen += [loss.detach() for loss in losses.values()]
        seen += [grad for grad in grads(trained) if grad is not None]
        for parameter in trained:
            parameter.grad = None
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_pefts_copies_losses_and_gradients_are_equal_to_the_bit(
    schedule, monkeypatch, dtype, checkpointing
):
    ours = losses_and_gradients(schedule, dtype, checkpointing)
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", as_peft_does)
    theirs = losses_and_gradients(schedule, dtype, checkpointing)
    assert len(ours) == len(theirs) > 100
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_under_autocast_no_layer_copies_its_input(schedule, monkeypatch):
    nets, _, batch = in_dtype(schedule, torch.bfloat16)
    told, dtype = batch.conditioning.to(torch.device("cpu"), torch.bfloat16), torch.bfloat16

    def copies():
        with Copies() as counted, torch.no_grad(), torch.autocast("cpu", dtype=dtype), nets.roles.student():
            nets.roles.predict(batch.noise, batch.timesteps, told)
        return counted.count

    ours = copies()
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", as_peft_does)
    # all layers' inputs are bfloat16, but for those that follow a norm, which autocast leaves in float32
    assert copies() - ours > len(adapters.lora_layers(nets.roles.unet)) / 2


def test_outside_autocast_a_half_precision_base_still_runs(schedule):
    nets, _, batch = in_dtype(schedule, torch.bfloat16)
    told = make_conditioning(len(batch.noise)).to(torch.device("cpu"), torch.bfloat16)
    with torch.no_grad(), nets.roles.student():
        assert nets.roles.predict(batch.noise, batch.timesteps, told).isfinite().all()


def test_logits_under_autocast_keep_the_difference_of_a_pair():
    """Features of a pair that differ by a hundredth: in bfloat16 the error of the difference is as large as itself."""
    torch.manual_seed(0)
    head = Head(32, 32, 8)
    real = randn(64, 32, 8, 8).bfloat16()
    student = (real + 0.01 * randn(64, 32, 8, 8, seed=1)).bfloat16()
    with torch.no_grad():
        exact = head(real.float()) - head(student.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(real), head(student)
    assert logits[0].dtype == torch.float32
    assert (logits[0] - logits[1] - exact).abs().max() < 1e-3 * exact.abs().max()
