"""Who computes what and who gets gradient, against separate U-Nets."""

import copy
from contextlib import contextmanager

import pytest
import torch

from stepdistill.config import DiscriminatorOptions
from stepdistill.data.batches import Batch
from stepdistill.diffusion.schedule import CLEAN
from stepdistill.models import adapters
from stepdistill.models.discriminator import HEADS, TRUNKS, Discriminator, encode
from stepdistill.models.roles import DISCRIMINATOR, STUDENT, TEACHER, Roles
from stepdistill.training.steps import Denoisers, adversarial_step, mse_step, noisy_latents, student_move
from tests.conftest import build_tiny_unet, make_conditioning, randn

BATCH = 3


def make_batch():
    return Batch(
        original_samples=randn(BATCH, 4, 8, 8),
        noise=randn(BATCH, 4, 8, 8, seed=1),
        timesteps=torch.tensor([999, 499, 249]),
        prev_timesteps=torch.tensor([749, 249, CLEAN]),
        conditioning=make_conditioning(BATCH),
        perturbation_uniform=torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64),
        perturbation_noise=randn(BATCH, 4, 8, 8, seed=2),
    )


def fill(unet, name, seed):
    """Gives an adapter weights that do something: B away from zero."""
    state = adapters.adapter_state(unet, name)
    filled = {k: randn(*v.shape, seed=seed + i) * 0.05 for i, (k, v) in enumerate(sorted(state.items()))}
    adapters.load_adapter_state(unet, name, filled)
    return filled


def make_nets(schedule, *, checkpointing=False, guidance_scale=1.0):
    roles = Roles(build_tiny_unet(), rank=4, seed=0, gradient_checkpointing=checkpointing)
    roles.teacher_is_base = False
    fill(roles.unet, STUDENT, 100)
    fill(roles.unet, TEACHER, 200)
    return Denoisers(roles, schedule, make_conditioning(1, seed=9), "epsilon", "epsilon", guidance_scale)


def make_discriminator(nets, **options):
    merged = {"trunk": "lora", "heads": "mid", "paired": True} | options
    discriminator = Discriminator(nets.roles, rank=4, seed=3, sample_size=8, base=build_tiny_unet(), **merged)
    if merged["trunk"] == "lora":
        fill(nets.roles.unet, DISCRIMINATOR, 300)
    return discriminator


def separate(state, name="default"):
    """A U-Net of its own with one adapter of the shared one's weights."""
    unet = build_tiny_unet()
    encoder_only = not any(key.startswith("up_blocks") for key in state)
    parameters = adapters.add_adapter(unet, name, rank=4, seed=0, encoder_only=encoder_only)
    adapters.load_adapter_state(unet, name, state)
    adapters.activate(unet, name)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return unet


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def forward(unet, x, t, c):
    return unet(x, t, encoder_hidden_states=c.encoder_hidden_states).sample


def test_zero_lora_leaves_the_unet_bit_identical():
    base, shared = build_tiny_unet(), build_tiny_unet()
    roles = Roles(shared, rank=4, seed=0)
    x, t, c = randn(BATCH, 4, 8, 8), torch.tensor([999, 499, 9]), make_conditioning(BATCH)
    wanted = forward(base, x, t, c)
    with roles.student():
        assert torch.equal(roles.predict(x, t, c), wanted)
    with roles.teacher():
        assert torch.equal(roles.predict(x, t, c), wanted)


def test_roles_are_played_on_a_device_that_knows_no_autocast():
    """eval/full_size.py counts on the meta device."""
    roles = Roles(build_tiny_unet().to("meta"), rank=4, seed=1)
    with torch.device("meta"):
        discriminator = Discriminator(
            roles, trunk="lora", heads="mid", paired=False, rank=4, seed=1, sample_size=8
        )
    told = make_conditioning(2).to("meta", torch.float32)
    timesteps = torch.empty(2, dtype=torch.int64, device="meta")
    with roles.discriminator(trainable=True):
        features = discriminator.features(torch.empty(2, 4, 8, 8, device="meta"), timesteps, told)
        assert discriminator.logits(features).shape == (2, 1)


def test_lora_covers_lcms_list_and_nothing_else():
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
def test_mse_gradients_equal_those_of_separate_unets(schedule, checkpointing):
    nets, batch = make_nets(schedule, checkpointing=checkpointing), make_batch()
    student = separate(adapters.adapter_state(nets.roles.unet, STUDENT))
    teacher = separate(adapters.adapter_state(nets.roles.unet, TEACHER))
    result = mse_step(nets, batch, teacher_steps=8, loss_space="prev_sample")
    result.losses["student"].backward()

    alone = Denoisers(_Separate(student, teacher), schedule, nets.unconditional, "epsilon", "epsilon", 1.0)
    wanted = mse_step(alone, batch, teacher_steps=8, loss_space="prev_sample")
    wanted.losses["student"].backward()
    assert torch.allclose(result.losses["student"], wanted.losses["student"], rtol=1e-6)
    for found, other in zip(
        grads(nets.roles.student_parameters),
        grads(adapters.adapter_parameters(student, "default")),
        strict=True,
    ):
        assert torch.allclose(found, other, atol=1e-6)
    assert all(p.grad is None for p in adapters.adapter_parameters(nets.roles.unet, TEACHER))


class _Separate:
    """Roles' interface over U-Nets of their own: what sharing must not change."""

    def __init__(self, student, teacher, trunk=None):
        from contextlib import contextmanager

        self._nets = {"student": student, "teacher": teacher}
        self._trunk, self.unet = trunk, student
        self.discriminator_parameters = []

        @contextmanager
        def role(name):
            self.unet = self._nets[name]
            yield

        @contextmanager
        def teacher_role():
            with torch.no_grad(), role("teacher"):
                yield

        self.student = lambda: role("student")
        self.teacher = teacher_role

    def discriminator(self, *, trainable):
        @contextmanager
        def role():
            self.unet = self._trunk
            for parameter in self.discriminator_parameters:
                parameter.requires_grad_(trainable)
            yield
            for parameter in self.discriminator_parameters:
                parameter.requires_grad_(True)

        return role()

    def predict(self, x, t, c):
        return forward(self.unet, x, t, c)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_adversarial_gradients_equal_those_of_separate_unets(schedule, checkpointing, paired, heads):
    nets, batch = make_nets(schedule, checkpointing=checkpointing), make_batch()
    discriminator = make_discriminator(nets, paired=paired, heads=heads)
    unet = nets.roles.unet
    student, teacher, trunk = (
        separate(adapters.adapter_state(unet, name)) for name in (STUDENT, TEACHER, DISCRIMINATOR)
    )
    apart = _Separate(student, teacher, trunk)
    twin = copy.copy(discriminator)
    twin._modules = copy.deepcopy(discriminator._modules)
    object.__setattr__(twin, "_roles", apart)
    apart.discriminator_parameters = [*twin.parameters(), *adapters.adapter_parameters(trunk, "default")]
    alone = Denoisers(apart, schedule, nets.unconditional, "epsilon", "epsilon", 1.0)

    options = {"teacher_steps": 8, "perturbation_weights": [1.0, 1.0, 1.0, 1.0]}
    result = adversarial_step(nets, discriminator, batch, **options)
    wanted = adversarial_step(alone, twin, batch, **options)
    apart_student = adapters.adapter_parameters(student, "default")
    for role, ours, theirs in (
        ("discriminator", nets.roles.discriminator_parameters, apart.discriminator_parameters),
        ("student", nets.roles.student_parameters, apart_student),
    ):
        result.losses[role].backward()
        wanted.losses[role].backward()
        assert torch.allclose(result.losses[role], wanted.losses[role], rtol=1e-6)
        scale = max(g.abs().max().item() for g in grads(theirs))
        assert scale > 1e-5
        for found, other in zip(grads(ours), grads(theirs), strict=True):
            assert torch.allclose(found, other, atol=1e-6 * max(1.0, scale))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_each_step_only_its_own_role_has_gradients(schedule, trunk, checkpointing):
    nets, batch = make_nets(schedule, checkpointing=checkpointing), make_batch()
    discriminator = make_discriminator(nets, trunk=trunk)
    roles = nets.roles
    result = adversarial_step(nets, discriminator, batch, teacher_steps=8, perturbation_weights=[1, 1, 1, 1])

    result.losses["student"].backward()
    assert all(p.grad is not None for p in roles.student_parameters)
    assert all(p.grad is None for p in roles.discriminator_parameters)
    for parameter in roles.student_parameters:
        parameter.grad = None
    result.losses["discriminator"].backward()
    assert all(p.grad is None for p in roles.student_parameters)
    assert all(p.grad is not None for p in roles.discriminator_parameters)
    assert all(p.grad is None for p in adapters.adapter_parameters(roles.unet, TEACHER))
    base = [p for n, p in roles.unet.named_parameters() if "lora_" not in n]
    assert not any(p.requires_grad for p in base)


@pytest.mark.parametrize("paired", [False, True])
def test_with_the_data_as_real_the_teacher_is_not_asked(schedule, monkeypatch, paired):
    """Real is x_0 noised to s with the noise of x_t: at a clean s x_0 itself; the student's side stays as it was."""
    nets, batch = make_nets(schedule), make_batch()
    discriminator = make_discriminator(nets, paired=paired)
    options = {"teacher_steps": 8, "perturbation_weights": [1.0, 1.0, 1.0, 1.0]}
    by_teacher = adversarial_step(nets, discriminator, batch, **options)
    monkeypatch.setattr(nets.roles, "teacher", lambda: pytest.fail("the teacher was asked"))
    result = adversarial_step(nets, discriminator, batch, real="data", **options)
    moved = student_move(nets, noisy_latents(nets, batch), batch).detach()
    alpha, sigma = schedule.alpha_sigma(batch.prev_timesteps, ndim=4, dtype=torch.float32)
    real = alpha * batch.original_samples + sigma * batch.noise
    assert torch.equal(real[2], batch.original_samples[2])
    assert torch.allclose(result.metrics["mse_to_data"], (moved - real).square().mean(), rtol=1e-5)
    assert torch.allclose(result.losses["student"], by_teacher.losses["student"], rtol=1e-5)
    assert not torch.allclose(result.losses["discriminator"], by_teacher.losses["discriminator"], rtol=1e-3)


def test_roles_restore_what_was_also_on_exceptions(schedule):
    roles = make_nets(schedule).roles
    before = roles.state

    def fail_inside():
        with roles.student(), roles.discriminator(trainable=False):
            assert adapters.active_adapter(roles.unet) is None
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert roles.state == before
    assert adapters.active_adapter(roles.unet) == before.adapter
    with roles.student():
        with roles.teacher():
            assert adapters.active_adapter(roles.unet) == TEACHER
            assert not torch.is_grad_enabled()
        assert adapters.active_adapter(roles.unet) == STUDENT
        assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in roles.student_parameters)


def test_a_frozen_discriminator_thaws_again(schedule):
    nets = make_nets(schedule)
    make_discriminator(nets)
    with nets.roles.discriminator(trainable=False):
        assert not any(p.requires_grad for p in nets.roles.discriminator_parameters)
    assert all(p.requires_grad for p in nets.roles.discriminator_parameters)


def test_encode_is_the_unets_own_encoder():
    unet, x, t, c = build_tiny_unet(), randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    seen = []
    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    forward(unet, x, t, c)
    wanted = list(seen)
    for found, other in zip(encode(unet, x, t, c), wanted, strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_starts_as_the_base_and_trains_what_it_says(schedule, trunk):
    nets = make_nets(schedule)
    discriminator = Discriminator(
        nets.roles,
        trunk=trunk,
        heads="multi",
        paired=False,
        rank=4,
        seed=3,
        sample_size=8,
        base=build_tiny_unet(),
    )
    x, t, c = randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    with nets.roles.discriminator(trainable=True):
        found = discriminator.features(x, t, c)
    for feature, wanted in zip(found, encode(build_tiny_unet(), x, t, c), strict=True):
        assert torch.equal(feature, wanted)
    assert discriminator.logits(found).shape == (2, 3)
    in_heads = sum(1 for _ in discriminator.heads.parameters())
    in_trunk = len(nets.roles.discriminator_parameters) - in_heads
    encoder = sum(
        1
        for n, _ in build_tiny_unet().named_parameters()
        if not n.startswith(("up_", "conv_out", "conv_norm"))
    )
    assert in_trunk == {"frozen": 0, "full": encoder, "lora": in_trunk}[trunk]
    assert (in_trunk > 0) == (trunk != "frozen")


def test_a_new_discriminator_replaces_the_old_one(schedule):
    nets = make_nets(schedule)
    make_discriminator(nets)
    count = len(nets.roles.discriminator_parameters)
    make_discriminator(nets)
    assert len(nets.roles.discriminator_parameters) == count
    nets.roles.drop_discriminator()
    assert not adapters.adapter_parameters(nets.roles.unet, DISCRIMINATOR)
    batch = make_batch()
    student_move(nets, batch.noise, batch).sum().backward()
    assert all(p.grad is not None for p in nets.roles.student_parameters)


def logits_of(nets, discriminator):
    x, t, c = randn(2, 4, 8, 8), torch.tensor([9, 749]), make_conditioning(2)
    with nets.roles.discriminator(trainable=True):
        features = discriminator.features(x, t, c)
        return features, discriminator.logits(features, features if discriminator.paired else None)


@pytest.mark.parametrize("before", ["paired", "single"])
@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_a_carried_discriminator_has_the_trunk_and_those_heads_that_fit(schedule, trunk, before):
    nets = make_nets(schedule)
    first = make_discriminator(nets, trunk=trunk, paired=before == "paired")
    with torch.no_grad():
        for parameter in nets.roles.discriminator_parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    features, logits = logits_of(nets, first)
    state = first.state()
    with torch.no_grad():  # what was learned is a copy
        for parameter in nets.roles.discriminator_parameters:
            parameter.zero_()
    options = {"trunk": trunk, "heads": "mid", "paired": False, "rank": 4, "sample_size": 8}
    second = Discriminator(nets.roles, seed=4, base=build_tiny_unet(), **options)
    fresh = {name: tensor.clone() for name, tensor in second.heads.state_dict().items()}
    second.load_state(state)
    carried_features, carried_logits = logits_of(nets, second)
    assert all(torch.equal(a, b) for a, b in zip(features, carried_features, strict=True))
    same = before == "single"
    assert torch.equal(logits, carried_logits) == same
    assert all(torch.equal(t, fresh[name]) for name, t in second.heads.state_dict().items()) != same
    assert all(p.requires_grad for p in nets.roles.discriminator_parameters)


def test_options_of_config_and_code_are_the_same():
    fields = DiscriminatorOptions.model_fields
    assert fields["trunk"].annotation.__args__ == TRUNKS
    assert fields["heads"].annotation.__args__ == HEADS
