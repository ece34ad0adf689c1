"""A half-precision network: no casts inside, float32 masters, and logits that keep small differences."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Head
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT, TEACHER, SharedNetwork
from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.training.optim import RoleOptimizer
from tests.conftest import build_tiny_unet, make_conditioning, randn
from tests.unit.test_gradients import fill, make_discriminator


def make_half(dtype=torch.bfloat16):
    """A network in half precision with adapters that have an effect."""
    network = SharedNetwork.with_student_and_teacher(build_tiny_unet().to(dtype), rank=4, seed=0)
    fill(network, STUDENT, 100)
    fill(network, TEACHER, 200)
    return network


def optimizer_of(weights, **options):
    settings = {"learning_rate": 1e-3, "adversarial": False, "max_train_steps": 100}
    return RoleOptimizer(weights, **settings | {"lr_warmup_steps": 0, "lr_final_fraction": 1.0} | options)


class Casts(TorchDispatchMode):
    """Counts the casts of large tensors from one dtype to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].numel() > 64 and args[0].dtype != result.dtype:
            self.count += 1
        return result


@pytest.mark.parametrize("adapter", [None, STUDENT, TEACHER])
def test_a_forward_pass_casts_only_its_input_and_output(adapter):
    network = make_half()
    conditioning = make_conditioning(2).to("cpu", torch.bfloat16)
    with Casts() as casts, torch.no_grad(), network.using(adapter):
        output = network.ask(randn(2, 4, 8, 8), torch.tensor([999, 9]), conditioning)
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert casts.count == 2  # and the embedding of the timestep, which has 64 elements or fewer


def test_the_network_computes_with_copies_of_float32_masters():
    network = make_half()
    discriminator = make_discriminator(network, heads="multi")
    for name in (STUDENT, DISCRIMINATOR):
        weights = network.weights(name)
        for key, master in weights.masters().items():
            parameter = weights.parameters[key]
            stays = key.startswith("heads.")
            assert parameter.dtype == (torch.float32 if stays else torch.bfloat16)
            assert torch.equal(parameter, master.to(parameter.dtype))
    assert {t.dtype for t in network.adapter_state(STUDENT).values()} == {torch.float32}
    assert {t.dtype for t in network.adapter_state(TEACHER).values()} == {torch.bfloat16}
    assert {t.dtype for t in discriminator.state().trunk.values()} == {torch.float32}


def test_updates_below_the_last_bit_of_the_copy_add_up():
    weights = TrainedWeights({"w": torch.nn.Parameter(torch.ones(8))}, dtype=torch.bfloat16)
    optimizer = optimizer_of(weights, learning_rate=1e-4)
    parameter = weights.parameters["w"]
    for step in range(1, 41):
        parameter.sum().backward()
        optimizer.step()
        assert torch.allclose(weights.masters()["w"], torch.full((8,), 1 - 1e-4 * step), atol=1e-6)
    assert torch.equal(parameter, torch.full((8,), 1 - 4e-3).bfloat16())
    assert not torch.equal(parameter, torch.ones(8).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_add_up_in_float32(dtype):
    weights = TrainedWeights(
        {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2, 2))}, dtype=dtype
    )
    optimizer = optimizer_of(weights)
    for _ in range(300):
        (weights.parameters["a"].sum() * 1.0 + weights.parameters["b"].sum() * 2.0).backward()
    assert all(parameter.grad is None for parameter in weights.parameters.values())
    parts = weights.views(weights.master.grad)
    assert torch.equal(parts["a"], torch.full((3,), 300.0))  # in bfloat16 a sum of ones stops at 256
    assert torch.equal(parts["b"], torch.full((2, 2), 600.0))
    assert optimizer.clip(1.0) == pytest.approx((3 * 300**2 + 4 * 600**2) ** 0.5)
    optimizer.close()
    weights.parameters["a"].sum().backward()
    assert weights.parameters["a"].grad is not None
    assert weights.master.grad is None


def test_one_flat_update_equals_torchs_adam_per_parameter():
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}
    ours = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    weights = TrainedWeights(ours)
    optimizer = optimizer_of(weights)
    plain = torch.optim.Adam(theirs.values(), lr=1e-3)
    for step in range(5):
        for parameters in (ours, theirs):
            sum((step + 1) * p.square().sum() for p in parameters.values()).backward()
        assert optimizer.clip(1.0) == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0))
        )
        optimizer.step()
        plain.step()
        plain.zero_grad()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in shapes)
    assert all(torch.equal(weights.masters()[name], ours[name]) for name in shapes)


@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_a_half_precision_discriminator_learns_in_float32(noise_path, trunk):
    network = make_half()
    discriminator = make_discriminator(network, trunk=trunk, paired=False)
    before = discriminator.state()
    optimizer = optimizer_of(network.weights(DISCRIMINATOR))
    conditioning = make_conditioning(2).to("cpu", torch.bfloat16)
    with discriminator.active(trains=True):
        features = discriminator.features(randn(2, 4, 8, 8), torch.tensor([9, 749]), conditioning)
        discriminator.logits(features).sum().backward()
    assert float(optimizer.clip(1.0)) > 0
    optimizer.step()
    after = discriminator.state()
    assert any(not torch.equal(before.trunk[name], after.trunk[name]) for name in before.trunk)
    assert any(not torch.equal(before.heads[name], after.heads[name]) for name in before.heads)
    discriminator.load_state(before, strict=True)
    again = discriminator.state()
    for part in ("trunk", "heads"):
        assert all(torch.equal(t, getattr(again, part)[n]) for n, t in getattr(before, part).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_near_those_in_float32(noise_path, dtype):
    """The angle between the gradients, as one vector; a wrong cast or scale would turn it."""
    angles = []
    flat = {}
    for kind in (torch.float32, dtype):
        network = make_half(kind)
        student = Denoiser(network, STUDENT, noise_path, "epsilon", trains=True)
        conditioning = make_conditioning(2).to("cpu", kind)
        output = student.output(randn(2, 4, 8, 8), torch.tensor([999, 9]), conditioning)
        (output - randn(2, 4, 8, 8, seed=4)).square().mean().backward()
        flat[kind] = torch.cat([p.grad.float().flatten() for p in network.group(STUDENT).values()])
    angles = torch.nn.functional.cosine_similarity(flat[torch.float32], flat[dtype], dim=0)
    assert angles > (0.99 if dtype == torch.bfloat16 else 0.9999)


def test_logits_keep_the_difference_between_similar_samples():
    """The features of the pair differ by a hundredth; in bfloat16 the rounding error would be as large as the difference."""
    torch.manual_seed(0)
    head = Head(32, 32, 8)
    real = randn(64, 32, 8, 8).bfloat16()
    student = (real + 0.01 * randn(64, 32, 8, 8, seed=1)).bfloat16()
    with torch.no_grad():
        exact = head(real.float()) - head(student.float())
        logits = head(real), head(student)
    assert logits[0].dtype == torch.float32
    assert (logits[0] - logits[1] - exact).abs().max() < 1e-3 * exact.abs().max()
