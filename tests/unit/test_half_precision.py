"""A half-precision base under autocast: no needless copies, and logits that keep small differences."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.config import DiscriminatorOptions, Phase
from stepdistill.models import adapters
from stepdistill.models.discriminator import Head
from stepdistill.models.shared_network import STUDENT
from tests.conftest import make_conditioning, randn
from tests.unit.test_gradients import MSE, grads, make_batch, make_discriminator, make_pair


def as_peft_does(self, x, dtype):
    """peft's default behaviour: casts the input to the dtype of the adapter's weights."""
    return None if x is None else x.to(dtype)


class Copies(TorchDispatchMode):
    """Counts copies into float32."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32:
            self.count += 1
        return func(*args, **(kwargs or {}))


def in_dtype(noise_path, dtype, *, checkpointing=False):
    """Student, teacher, discriminator and a batch on a base in this dtype; trained parameters are float32."""
    pair = make_pair(noise_path, checkpointing=checkpointing)
    discriminator = make_discriminator(pair.network, heads="multi")
    for name, parameter in pair.network.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return pair, discriminator, make_batch(noise_path)


def losses_and_gradients(noise_path, dtype, checkpointing):
    pair, discriminator, batch = in_dtype(noise_path, dtype, checkpointing=checkpointing)
    trained = [*pair.student_parameters, *pair.discriminator_parameters]
    values = []
    for phase in (
        MSE,
        Phase(objective="paired", discriminator=DiscriminatorOptions(loss="relativistic")),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            losses = pair.losses(batch, phase, discriminator).by_role
        for loss in losses.values():
            loss.backward()
        values += [loss.detach() for loss in losses.values()]
        values += [grad for grad in grads(trained) if grad is not None]
        for parameter in trained:
            parameter.grad = None
    return values


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.slow_after_first
def test_without_pefts_copies_losses_and_gradients_are_bit_identical(
    noise_path, monkeypatch, dtype, checkpointing
):
    ours = losses_and_gradients(noise_path, dtype, checkpointing)
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", as_peft_does)
    theirs = losses_and_gradients(noise_path, dtype, checkpointing)
    assert len(ours) == len(theirs) > 100
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_under_autocast_no_layer_copies_its_input(noise_path, monkeypatch):
    pair, _, batch = in_dtype(noise_path, torch.bfloat16)
    network, dtype = pair.network, torch.bfloat16
    conditioning = batch.conditioning.to(torch.device("cpu"), dtype)

    def copies():
        with Copies() as counted, torch.no_grad(), torch.autocast("cpu", dtype=dtype), network.using(STUDENT):
            network.ask(batch.noise, batch.timesteps, conditioning)
        return counted.count

    ours = copies()
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", as_peft_does)
    # all layers' inputs are bfloat16, except after a norm, whose output autocast leaves in float32
    assert copies() - ours > len(adapters.lora_layers(network.model)) / 2


def test_a_half_precision_base_runs_outside_autocast(noise_path):
    pair, _, batch = in_dtype(noise_path, torch.bfloat16)
    conditioning = make_conditioning(len(batch.noise)).to(torch.device("cpu"), torch.bfloat16)
    with torch.no_grad(), pair.network.using(STUDENT):
        assert pair.network.ask(batch.noise, batch.timesteps, conditioning).isfinite().all()


def test_logits_under_autocast_keep_the_difference_between_similar_samples():
    """The features of the pair differ by a hundredth; in bfloat16 the rounding error would be as large as the difference."""
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
