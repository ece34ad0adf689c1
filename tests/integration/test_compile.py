"""Compiled blocks: no graph breaks, no compiling after the first update, and gradients equal to those of eager code."""

import dataclasses
import functools
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from stepdistill.config import Phase
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT, TEACHER, SharedNetwork
from stepdistill.training.phase import losses_and_gradients
from stepdistill.training.samples import Samples
from tests.conftest import build_tiny_unet, make_conditioning, randn
from tests.unit import test_sd3, test_z_image
from tests.unit.test_gradients import Denoiser, fill, make_batch
from tests.unit.test_half_precision import optimizer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler"),
]


def compiled_by(module, backend, **options):
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **options)


def network_of(*, compiles, checkpointing, paired=False):
    network = SharedNetwork.with_student_and_teacher(
        build_tiny_unet(), rank=4, seed=0, gradient_checkpointing=checkpointing, compiles=compiles
    )
    fill(network, STUDENT, 100)
    fill(network, TEACHER, 200)
    options = {"trunk": "lora", "heads": "multi", "paired": paired, "rank": 4, "seed": 3}
    discriminator = Discriminator(network, sample_size=8, **options)
    fill(network, DISCRIMINATOR, 300)
    return network, discriminator


def gradients(network, discriminator, noise_path, objectives=("mse", "single")):
    """The gradients of an mse and of an adversarial update: teacher, student, discriminator, trained and frozen."""
    student = Denoiser(network, STUDENT, noise_path, "epsilon", trains=True)
    teacher = Denoiser(network, TEACHER, noise_path, "epsilon")
    for phase in (Phase(objective=objective) for objective in objectives):
        samples = Samples(
            make_batch(noise_path), student=student, teacher=teacher, discriminator=discriminator
        )
        losses_and_gradients(samples, phase, torch.Tensor.backward)
    parameters = network.group(STUDENT) | (network.group(DISCRIMINATOR) if "single" in objectives else {})
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize(
    ("checkpointing", "builds"), [(False, False), (True, True)], ids=["graphs", "checkpointing"]
)
def test_compiled_blocks_are_equal_and_compiled_once(monkeypatch, noise_path, checkpointing, builds):
    """builds: whether C++ code is built of the graphs, which takes minutes: of an mse update alone."""
    objectives = ("mse",) if builds else ("mse", "single")
    torch._dynamo.reset()
    counters.clear()
    if not builds:
        traced = functools.partialmethod(compiled_by, "aot_eager")
        monkeypatch.setattr(torch.nn.Module, "compile", traced)
    eager = gradients(*network_of(compiles=False, checkpointing=checkpointing), noise_path, objectives)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = network_of(compiles=True, checkpointing=checkpointing)
    first = gradients(*compiled, noise_path, objectives)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 2 * len(objectives)  # of two kinds of blocks for each role
    again = [gradients(*compiled, noise_path, objectives) for _ in range(2)]
    assert counters["stats"]["unique_graphs"] == graphs, "a block was compiled again"
    assert not counters["graph_break"]
    for name, gradient in eager.items():
        assert torch.allclose(first[name], gradient, rtol=1e-4, atol=1e-5), name
    for repeated in again:
        assert all(torch.equal(repeated[name], first[name]) for name in first)


@pytest.mark.parametrize("sizes_vary", [False, True])
def test_each_size_has_code_of_its_own_unless_sizes_vary(monkeypatch, noise_path, sizes_vary):
    torch._dynamo.reset()
    symbolic = []

    def spied(graph, _inputs):
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        symbolic.extend(x for x in values if not isinstance(x, torch.Tensor))
        symbolic.extend(
            s for x in values if isinstance(x, torch.Tensor) for s in x.shape if not isinstance(s, int)
        )
        return graph.forward

    unet = build_tiny_unet()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compiled_by, spied))
    network = SharedNetwork.with_student_and_teacher(
        unet, rank=4, seed=0, compiles=True, sizes_vary=sizes_vary
    )
    for side in (8, 16):
        with torch.no_grad(), network.using(STUDENT):
            network.ask(randn(2, 4, side, side), torch.tensor([900, 300]), make_conditioning(2))
    assert bool(symbolic) == sizes_vary


def test_a_compiled_training_continued_from_its_state_is_bit_identical(noise_path):
    def trained(network, discriminator, updates, state=None):
        optimizer = optimizer_of(network.weights(STUDENT))
        if state is not None:
            network.load_adapter_state(STUDENT, state[0])
            optimizer.load_state_dict(state[1])
        student = Denoiser(network, STUDENT, noise_path, "epsilon", trains=True)
        teacher = Denoiser(network, TEACHER, noise_path, "epsilon")
        for _ in range(updates):
            samples = Samples(make_batch(noise_path), student=student, teacher=teacher)
            losses_and_gradients(samples, Phase(objective="mse"), torch.Tensor.backward)
            optimizer.step()
        return network.adapter_state(STUDENT), optimizer.state_dict()

    straight, _ = trained(*network_of(compiles=True, checkpointing=True), 4)
    half = trained(*network_of(compiles=True, checkpointing=True), 2)
    resumed, _ = trained(*network_of(compiles=True, checkpointing=True), 2, half)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.parametrize("objective", ["single", "paired"])
def test_micro_batches_of_compiled_blocks_add_up_to_the_eager_gradient(monkeypatch, noise_path, objective):
    """The float32 sums of the gradients of three micro-batches of one sample are the gradient of the batch of three. Without
    C++ code, which `test_compiled_blocks_are_equal_and_compiled_once` compares."""
    traced = functools.partialmethod(compiled_by, "aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    phase = Phase(objective=objective, discriminator={"real": "data"})
    whole = dataclasses.replace(make_batch(noise_path), teacher_moves=None)

    def summed(parts, *, compiles):
        network, discriminator = network_of(
            compiles=compiles, checkpointing=True, paired=objective == "paired"
        )
        student = Denoiser(network, STUDENT, noise_path, "epsilon", trains=True)
        optimizers = {role: optimizer_of(network.weights(role)) for role in (STUDENT, DISCRIMINATOR)}
        for rows in torch.arange(len(whole.noise)).chunk(parts):
            batch = whole._changed(lambda tensor, rows=rows: tensor[rows])
            samples = Samples(batch, student=student, teacher=None, discriminator=discriminator)
            losses_and_gradients(samples, phase, lambda loss: (loss / parts).backward())
        return {role: optimizer.weights.master.grad for role, optimizer in optimizers.items()}

    eager, compiled = summed(1, compiles=False), summed(3, compiles=True)
    for role, gradient in eager.items():
        assert gradient.any()
        assert torch.allclose(compiled[role], gradient, rtol=1e-4, atol=1e-5), role


TRANSFORMERS = {
    "sd3": (test_sd3, [test_sd3.conditioning()]),
    "z_image": (test_z_image, [test_z_image.conditioning(), test_z_image.conditioning((3, 7, 5), 32)]),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_compiled_transformer_has_the_eager_gradients_whatever_the_texts_lengths(monkeypatch, family):
    """As far as the graphs go; their C++ code takes minutes to build."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compiled_by, "aot_eager"))
    counters.clear()
    module, texts = TRANSFORMERS[family]
    eager = _gradients_by_text(module, texts, compiles=False)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = _gradients_by_text(module, texts, compiles=True)
    assert counters["stats"]["unique_graphs"] > 2
    assert not counters["graph_break"]
    for found, expected in zip(compiled, eager, strict=True):
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def _gradients_by_text(module, texts, *, compiles):
    """The student's gradients of an mse update for each of the texts, with checkpointing."""
    pair = module.make_pair(checkpointing=True, compiles=compiles, sizes_vary=len(texts) > 1)
    parameters, found = pair.network.group(STUDENT), []
    for text in texts:
        pair.losses(module.make_batch(text), Phase(objective="mse"), None).by_role[STUDENT].backward()
        found.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
    return found
