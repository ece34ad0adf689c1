"""Which network computes what and which gets gradients, compared with separate U-Nets."""

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch

from stepdistill.config import DiscriminatorOptions, Phase
from stepdistill.data.batches import Batch, Perturbation
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.models import adapters
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import HEADS, TRUNKS, Discriminator
from stepdistill.models.network.unet import UNetKind
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT, TEACHER, SharedNetwork
from stepdistill.training.losses import loss_of, roles_of
from stepdistill.training.samples import Samples
from tests.conftest import build_tiny_unet, make_conditioning, randn

BATCH = 3
MSE = Phase(objective="mse")


def make_batch(noise_path, *, teacher_steps=8, timesteps=(999, 499, 249), ends=(749, 249, CLEAN)):
    """A batch in which the discriminator sees clean samples at the largest t*."""
    seen_at = torch.tensor([e if e != CLEAN else 749 for e in ends])
    return Batch(
        original_samples=randn(BATCH, 4, 8, 8),
        noise=randn(BATCH, 4, 8, 8, seed=1),
        timesteps=torch.tensor(timesteps),
        prev_timesteps=torch.tensor(ends),
        conditioning=make_conditioning(BATCH),
        teacher_moves=noise_path.substeps(timesteps, ends, teacher_steps),
        perturbation=Perturbation(seen_at, randn(BATCH, 4, 8, 8, seed=2)),
    )


def fill(network, name, seed):
    """Gives an adapter weights that have an effect: B is not zero."""
    state = network.adapter_state(name)
    filled = {k: randn(*v.shape, seed=seed + i) * 0.05 for i, (k, v) in enumerate(sorted(state.items()))}
    network.load_adapter_state(name, filled)
    return filled


class Pair(NamedTuple):
    """Student and teacher on one network, each with its adapter."""

    student: Denoiser
    teacher: Denoiser

    @property
    def network(self):
        return self.student.network

    @property
    def student_parameters(self):
        return list(self.network.group(STUDENT).values())

    @property
    def discriminator_parameters(self):
        return list(self.network.group(DISCRIMINATOR).values())

    def losses(self, batch, phase, discriminator=None, **options):
        options = {"taps": phase.taps, "discriminator": discriminator} | options
        samples = Samples(batch, student=self.student, teacher=self.teacher, **options)
        return losses_of(samples, phase)


class Losses(NamedTuple):
    """The losses of all roles, with their graphs, and all metrics."""

    by_role: dict
    metrics: dict


def losses_of(samples, phase):
    """Computes the losses of all roles before any backward pass."""
    losses = {role: loss_of(role, samples, phase) for role in roles_of(phase)}
    metrics = {name: value for loss in losses.values() for name, value in loss.metrics.items()}
    return Losses({role: loss.value for role, loss in losses.items()}, metrics)


def make_network(*, checkpointing=False):
    return SharedNetwork.with_student_and_teacher(
        build_tiny_unet(), rank=4, seed=0, gradient_checkpointing=checkpointing
    )


def make_pair(noise_path, *, checkpointing=False):
    network = make_network(checkpointing=checkpointing)
    fill(network, STUDENT, 100)
    fill(network, TEACHER, 200)
    return Pair(
        Denoiser(network, STUDENT, noise_path, "epsilon", trains=True),
        Denoiser(network, TEACHER, noise_path, "epsilon"),
    )


def make_discriminator(network, **options):
    merged = {"trunk": "lora", "heads": "mid", "paired": True} | options
    discriminator = Discriminator(network, rank=4, seed=3, sample_size=8, base=build_tiny_unet(), **merged)
    if merged["trunk"] == "lora":
        fill(network, DISCRIMINATOR, 300)
    return discriminator


def separate(denoiser):
    """The same denoiser on a separate U-Net."""
    network = SharedNetwork(build_tiny_unet())
    network.add_adapter(denoiser.adapter, rank=4, seed=0, trains=denoiser.trains)
    network.load_adapter_state(denoiser.adapter, denoiser.network.adapter_state(denoiser.adapter))
    return dataclasses.replace(denoiser, network=network)


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def check_adversarial_gradients(shared, alone, batch, discriminators, *, paired):
    """The loss of each role and its gradient are equal on one shared network and on separate ones.

    discriminators: the shared network's and the separate one's, with equal weights.
    """
    discriminator, twin = discriminators
    phase = Phase(objective="paired" if paired else "single")
    ours, theirs = shared.losses(batch, phase, discriminator), alone.losses(batch, phase, twin)
    for role, parameters, others in (
        ("discriminator", discriminator.trained.values(), twin.trained.values()),
        ("student", shared.student_parameters, alone.student_parameters),
    ):
        ours.by_role[role].backward()
        theirs.by_role[role].backward()
        assert torch.allclose(ours.by_role[role], theirs.by_role[role], rtol=1e-6)
        scale = max(g.abs().max().item() for g in grads(others))
        assert scale > 1e-5
        for gradient, other in zip(grads(parameters), grads(others), strict=True):
            assert torch.allclose(gradient, other, atol=1e-6 * max(1.0, scale))


def forward(unet, x, t, c):
    return unet(x, t, encoder_hidden_states=c.encoder_hidden_states).sample


def encode(unet, x, t, c):
    return UNetKind().features(unet, x, t, c)


def test_zero_lora_leaves_the_unet_bit_identical():
    network = make_network()
    x, t, c = randn(BATCH, 4, 8, 8), torch.tensor([999, 499, 9]), make_conditioning(BATCH)
    expected = forward(build_tiny_unet(), x, t, c)
    for adapter in (STUDENT, TEACHER, None):
        with network.using(adapter):
            assert torch.equal(network.ask(x, t, c), expected)


def test_a_network_runs_on_the_meta_device():
    """The plan of a run counts operations and memory on it."""
    network = SharedNetwork(build_tiny_unet().to("meta"))
    with torch.device("meta"):
        discriminator = Discriminator(
            network, trunk="lora", heads="mid", paired=False, rank=4, seed=1, sample_size=8
        )
    conditioning = make_conditioning(2).to("meta", torch.float32)
    timesteps = torch.empty(2, dtype=torch.int64, device="meta")
    with discriminator.active(trains=True):
        features = discriminator.features(torch.empty(2, 4, 8, 8, device="meta"), timesteps, conditioning)
        assert discriminator.logits(features).shape == (2, 1)


def test_lora_covers_the_layers_of_lcm_lora_and_no_others():
    unet = build_tiny_unet()
    adapters.add_adapter(unet, STUDENT, rank=4, seed=0)
    carried = {n for n, m in unet.named_modules() if m in adapters.lora_layers(unet)}
    plain = {
        n
        for n, m in build_tiny_unet().named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
        and not n.startswith(("conv_in", "conv_out", "time_embedding"))
    }
    assert carried == plain
    assert all(layer.scaling[STUDENT] == 1.0 for layer in adapters.lora_layers(unet))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mse_gradients_equal_those_of_separate_unets(noise_path, checkpointing):
    shared, batch = make_pair(noise_path, checkpointing=checkpointing), make_batch(noise_path)
    alone = Pair(separate(shared.student), separate(shared.teacher))
    losses = [pair.losses(batch, MSE).by_role["student"] for pair in (shared, alone)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-6)
    for ours, theirs in zip(grads(shared.student_parameters), grads(alone.student_parameters), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert all(p.grad is None for p in adapters.adapter_parameters(shared.network.model, TEACHER).values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_adversarial_gradients_equal_those_of_separate_unets(noise_path, checkpointing, paired, heads):
    shared, batch = make_pair(noise_path, checkpointing=checkpointing), make_batch(noise_path)
    discriminator = make_discriminator(shared.network, paired=paired, heads=heads)
    alone = Pair(separate(shared.student), separate(shared.teacher))
    twin = make_discriminator(SharedNetwork(build_tiny_unet()), paired=paired, heads=heads)
    twin.load_state(discriminator.state())
    check_adversarial_gradients(shared, alone, batch, (discriminator, twin), paired=paired)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_loss_gives_gradients_to_its_own_role_only(noise_path, trunk, checkpointing):
    pair, batch = make_pair(noise_path, checkpointing=checkpointing), make_batch(noise_path)
    discriminator = make_discriminator(pair.network, trunk=trunk)
    losses = pair.losses(batch, Phase(objective="paired"), discriminator).by_role
    losses["student"].backward()
    assert all(p.grad is not None for p in pair.student_parameters)
    assert all(p.grad is None for p in pair.discriminator_parameters)
    for parameter in pair.student_parameters:
        parameter.grad = None
    losses["discriminator"].backward()
    assert all(p.grad is None for p in pair.student_parameters)
    assert all(p.grad is not None for p in pair.discriminator_parameters)
    model = pair.network.model
    assert all(p.grad is None for p in adapters.adapter_parameters(model, TEACHER).values())
    base = [p for n, p in model.named_parameters() if "lora_" not in n]
    assert not any(p.requires_grad for p in base)


@pytest.mark.parametrize("objective", ["paired", "single"])
def test_the_teacher_is_not_evaluated_if_the_real_samples_are_data(noise_path, objective):
    """The real sample is x_0 noised to s with the noise of x_t (x_0 if s is clean); the student's side is unchanged."""
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    discriminator = make_discriminator(pair.network, paired=objective == "paired")
    by_teacher = pair.losses(batch, Phase(objective=objective), discriminator)
    without_teacher = dataclasses.replace(batch, teacher_moves=None)  # a roll-out would fail
    phase = Phase(objective=objective, discriminator=DiscriminatorOptions(real="data"))
    by_data = pair.losses(without_teacher, phase, discriminator)
    moved = Samples(batch, student=pair.student, teacher=pair.teacher).student_sample.detach()
    alpha, sigma = noise_path.alpha_sigma(batch.prev_timesteps, ndim=4, dtype=torch.float32)
    real = alpha * batch.original_samples + sigma * batch.noise
    assert torch.equal(real[2], batch.original_samples[2])
    assert torch.allclose(by_data.metrics["mse_to_data"], (moved - real).square().mean(), rtol=1e-5)
    assert torch.allclose(by_data.by_role["student"], by_teacher.by_role["student"], rtol=1e-5)
    assert not torch.allclose(
        by_data.by_role["discriminator"], by_teacher.by_role["discriminator"], rtol=1e-3
    )


def test_a_network_restores_its_state_also_after_exceptions(noise_path):
    pair = make_pair(noise_path)
    network, discriminator = pair.network, make_discriminator(pair.network, trunk="frozen")
    before = network.state

    def fail_inside():
        with network.using(STUDENT), discriminator.active(trains=False):
            assert adapters.active_adapter(network.model).name is None
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert network.state == before
    assert adapters.active_adapter(network.model).name == before.adapter
    with network.using(STUDENT):
        with network.using(TEACHER):
            assert adapters.active_adapter(network.model).name == TEACHER
        assert adapters.active_adapter(network.model).name == STUDENT
    assert all(p.requires_grad for p in pair.student_parameters)
    assert torch.is_grad_enabled()


def test_only_the_student_computes_gradients(noise_path):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    inputs = (batch.noise, batch.timesteps, batch.conditioning)
    assert pair.student.output(*inputs).requires_grad
    assert not pair.teacher.output(*inputs).requires_grad
    with torch.no_grad():
        assert not pair.student.output(*inputs).requires_grad


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_frozen_discriminator_becomes_trainable_again(noise_path, trunk):
    discriminator = make_discriminator(make_pair(noise_path).network, trunk=trunk, paired=False)
    inputs = (torch.tensor([9, 749]), make_conditioning(2))

    def learns(trains):
        x = randn(2, 4, 8, 8).requires_grad_(True)
        with discriminator.active(trains=trains):
            discriminator.logits(discriminator.features(x, *inputs)).sum().backward()
        assert x.grad is not None
        received = [p.grad is not None for p in discriminator.trained.values()]
        for parameter in discriminator.trained.values():
            parameter.grad = None
        return received

    count = len(discriminator.trained)
    assert [learns(trains) for trains in (True, False, True)] == [
        [True] * count,
        [False] * count,
        [True] * count,
    ]


def test_features_are_those_of_the_unets_own_encoder():
    unet, x, t, c = build_tiny_unet(), randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    outputs = []
    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(
            lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    forward(unet, x, t, c)
    expected = list(outputs)
    for feature, other in zip(encode(unet, x, t, c), expected, strict=True):
        assert torch.equal(feature, other)
    shapes = [(f.shape[1], min(f.shape[2:])) for f in expected]
    assert UNetKind().feature_shapes(unet, 8) == shapes


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_starts_as_the_base_and_trains_the_documented_parameters(trunk):
    network = make_network()
    options = {"trunk": trunk, "heads": "multi", "paired": False, "rank": 4, "sample_size": 8}
    discriminator = Discriminator(network, seed=3, base=build_tiny_unet(), **options)
    x, t, c = randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    with discriminator.active(trains=True):
        features = discriminator.features(x, t, c)
    for feature, expected in zip(features, encode(build_tiny_unet(), x, t, c), strict=True):
        assert torch.equal(feature, expected)
    assert discriminator.logits(features).shape == (2, 3)
    in_trunk = [name for name in discriminator.trained if not name.startswith("heads.")]
    encoder = {
        f"encoder.{n}"
        for n, _ in build_tiny_unet().named_parameters()
        if not n.startswith(("up_", "conv_out", "conv_norm"))
    }
    if trunk == "lora":
        assert in_trunk
        assert all(f".{DISCRIMINATOR}." in name for name in in_trunk)
    else:
        assert set(in_trunk) == {"frozen": set(), "full": encoder}[trunk]


def test_a_closed_discriminator_leaves_no_adapter_on_the_network(noise_path):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    discriminator = make_discriminator(pair.network)
    count = len(discriminator.trained)
    discriminator.close()
    assert pair.discriminator_parameters == []
    assert not adapters.adapter_parameters(pair.network.model, DISCRIMINATOR)
    assert len(make_discriminator(pair.network).trained) == count
    Samples(batch, student=pair.student, teacher=pair.teacher).student_sample.sum().backward()
    assert all(p.grad is not None for p in pair.student_parameters)


def logits_of(discriminator):
    x, t, c = randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    with discriminator.active(trains=True):
        features = discriminator.features(x, t, c)
        return features, discriminator.logits(features, features if discriminator.paired else None)


@pytest.mark.parametrize("before", ["paired", "single"])
@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_a_carried_discriminator_keeps_the_trunk_and_the_heads_that_fit(trunk, before):
    network = make_network()
    first = make_discriminator(network, trunk=trunk, paired=before == "paired")
    with torch.no_grad():
        for parameter in first.trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    features, logits = logits_of(first)
    state = first.state()
    with torch.no_grad():  # state() returned copies, which this must not change
        for parameter in first.trained.values():
            parameter.zero_()
    first.close()
    options = {"trunk": trunk, "heads": "mid", "paired": False, "rank": 4, "sample_size": 8}
    second = Discriminator(network, seed=4, base=build_tiny_unet(), **options)
    fresh = copy.deepcopy(second.heads.state_dict())
    second.load_state(state)
    carried_features, carried_logits = logits_of(second)
    assert all(torch.equal(a, b) for a, b in zip(features, carried_features, strict=True))
    same = before == "single"
    assert torch.equal(logits, carried_logits) == same
    assert all(torch.equal(t, fresh[name]) for name, t in second.heads.state_dict().items()) != same
    assert all(p.requires_grad for p in second.trained.values())


def test_config_and_code_have_the_same_discriminator_options():
    fields = DiscriminatorOptions.model_fields
    assert fields["trunk"].annotation.__args__ == TRUNKS
    assert fields["heads"].annotation.__args__ == HEADS
