"""The transformer of Stable Diffusion 3 under the roles of a run: the same weights, features and gradients as alone."""

import dataclasses

import pytest
import torch
from diffusers import SD3Transformer2DModel

from stepdistill.config import Phase
from stepdistill.data.batches import Batch, Perturbation
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.rectified_flow import RectifiedFlow
from stepdistill.models import adapters
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import HEADS, TRUNKS, Discriminator
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.sd3 import SD3Kind
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT, TEACHER, SharedNetwork
from tests.conftest import randn
from tests.unit.test_gradients import Pair, check_adversarial_gradients, fill, grads

PATH = RectifiedFlow(3.0)


def build(**options):
    """Four blocks, of which the first has a second attention of the image alone, as SD3.5-medium's first ones have."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
    sizes |= {"pooled_projection_dim": 6, "out_channels": 4, "pos_embed_max_size": 8}
    network = SD3Transformer2DModel(
        **sizes | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} | options
    )
    for parameter in network.parameters():  # the last layers of blocks begin at 0, and would hide the rest
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network.eval().requires_grad_(False)


def conditioning(batch=3):
    return Conditioning(randn(batch, 5, 12, seed=5), {"pooled_projections": randn(batch, 6, seed=6)})


def asked(network):
    return SD3Kind().ask(
        network, randn(3, 4, 8, 8), PATH.network_times(torch.tensor([999, 499, 9])), conditioning()
    )


def make_pair(*, checkpointing=False, **options):
    network = SharedNetwork.with_student_and_teacher(
        build(), rank=4, seed=0, gradient_checkpointing=checkpointing, **options
    )
    fill(network, STUDENT, 100)
    fill(network, TEACHER, 200)
    teacher = Denoiser(network, TEACHER, PATH, "velocity", guidance_scale=4.0, unconditional=conditioning(1))
    return Pair(Denoiser(network, STUDENT, PATH, "velocity", trains=True), teacher)


def separate(denoiser, build=build):
    network = SharedNetwork(build())
    network.add_adapter(denoiser.adapter, rank=4, seed=0, trains=denoiser.trains)
    network.load_adapter_state(denoiser.adapter, denoiser.network.adapter_state(denoiser.adapter))
    return dataclasses.replace(denoiser, network=network)


def make_batch(texts=None):
    nodes, ends = (999, 499, 249), (749, 249, CLEAN)
    seen_at = torch.tensor([749, 249, PATH.timestep_at(0.5)])
    return Batch(
        original_samples=randn(3, 4, 8, 8),
        noise=randn(3, 4, 8, 8, seed=1),
        timesteps=torch.tensor(nodes),
        prev_timesteps=torch.tensor(ends),
        conditioning=conditioning() if texts is None else texts,
        teacher_moves=PATH.substeps(nodes, ends, 8),
        perturbation=Perturbation(seen_at, randn(3, 4, 8, 8, seed=2)),
    )


def make_discriminator(network, **options):
    merged = {"trunk": "lora", "heads": "multi", "paired": False} | options
    discriminator = Discriminator(network, rank=4, seed=3, sample_size=8, base=build(), **merged)
    if merged["trunk"] == "lora":
        fill(network, DISCRIMINATOR, 300)
    return discriminator


def test_a_student_begins_as_the_base():
    network, expected = SharedNetwork.with_student_and_teacher(build(), rank=4, seed=0), asked(build())
    for adapter in (STUDENT, TEACHER, None):
        with network.using(adapter):
            assert torch.equal(asked(network.model), expected)


def test_lora_covers_attention_and_feed_forward_layers_of_every_block():
    network = build()
    adapters.add_adapter(network, STUDENT, rank=4, seed=0, targets=SD3Kind.lora_targets)
    carried = {n for n, m in network.named_modules() if m in adapters.lora_layers(network)}
    projections = {
        n
        for n, m in build().named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("transformer_blocks.") and ".norm" not in n
    }
    assert carried == projections


@pytest.mark.parametrize("layers", [1, 2, 4, 9])
def test_features_are_the_tokens_after_blocks_of_the_whole_network(layers):
    network, tokens = build(num_layers=layers), []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda _m, _i, out: tokens.append(out[1]))
    asked(network)
    depths = {1: [1], 2: [1], 4: [1, 2, 3], 9: [2, 4, 6]}[layers]
    expected = [tokens[depth - 1].transpose(1, 2).reshape(3, 16, 4, 4) for depth in depths]
    times = PATH.network_times(torch.tensor([999, 499, 9]))
    for encoder in (build(num_layers=layers), SD3Kind().encoder_copy(network)):
        features = SD3Kind().features(encoder, randn(3, 4, 8, 8), times, conditioning())
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    shapes = [(f.shape[1], min(f.shape[2:])) for f in expected]
    assert SD3Kind().feature_shapes(network, 8) == shapes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mse_gradients_equal_those_of_separate_networks(checkpointing):
    shared, batch = make_pair(checkpointing=checkpointing), make_batch()
    alone = Pair(separate(shared.student), separate(shared.teacher))
    losses = [pair.losses(batch, Phase(objective="mse")).by_role["student"] for pair in (shared, alone)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-6)
    assert max(g.abs().max() for g in grads(alone.student_parameters)) > 1e-5
    for ours, theirs in zip(grads(shared.student_parameters), grads(alone.student_parameters), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_adversarial_gradients_equal_those_of_separate_networks(checkpointing, paired, heads):
    shared, batch = make_pair(checkpointing=checkpointing), make_batch()
    discriminator = make_discriminator(shared.network, paired=paired, heads=heads)
    alone = Pair(separate(shared.student), separate(shared.teacher))
    twin = make_discriminator(SharedNetwork(build()), paired=paired, heads=heads)
    twin.load_state(discriminator.state())
    check_adversarial_gradients(shared, alone, batch, (discriminator, twin), paired=paired)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_each_loss_gives_gradients_to_its_own_role_only(trunk):
    pair, batch = make_pair(), make_batch()
    discriminator = make_discriminator(pair.network, trunk=trunk)
    losses = pair.losses(batch, Phase(objective="single"), discriminator).by_role
    losses["student"].backward()
    assert all(p.grad is not None for p in pair.student_parameters)
    assert all(p.grad is None for p in pair.discriminator_parameters)
    for parameter in pair.student_parameters:
        parameter.grad = None
    losses["discriminator"].backward()
    assert all(p.grad is None for p in pair.student_parameters)
    if trunk == "lora":
        assert all(p.grad is not None for p in pair.discriminator_parameters)


def test_taps_name_thirds_of_the_blocks_or_modules():
    kind, network = SD3Kind(), build()
    names = [f"transformer_blocks.{index}" for index in range(4)]
    places = [kind.modules_at(network, place) for place in ("encoder", "middle", "decoder")]
    assert places == [names[:1], names[1:3], names[3:]]
    assert kind.modules_at(network, "transformer_blocks.2.ff") == ["transformer_blocks.2.ff"]
    with pytest.raises(ValueError, match="names no module of the SD3Transformer2DModel"):
        kind.modules_at(network, "down_blocks.0")
    with pytest.raises(ValueError, match=r"has no encoder; allowed: middle$"):
        kind.modules_at(build(num_layers=2), "encoder")
