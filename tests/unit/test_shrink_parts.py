"""What can be removed from a U-Net: the config of the rest, where its weights come from, and which parts are chosen."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.export.kohya import sgm_name
from stepdistill.ladder.check import check_training
from stepdistill.shrink.check import check_shrink_fits
from stepdistill.shrink.smaller_network import (
    OutputError,
    Removal,
    chosen,
    parameters_of,
    plain_config,
    removals,
    sensitivity_table,
    smaller_network,
)
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.families import plannable_facts
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.unet_parts import MIDDLE, MIDDLE_END, removable, smaller_config, source_name
from tests.conftest import make_conditioning, randn


def unet_of(seed=0, **options):
    """Two levels with two residual blocks each and three transformer blocks at the second, in tiny widths."""
    torch.manual_seed(seed)
    merged = {
        "sample_size": 8,
        "layers_per_block": 3,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 3),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    } | options
    return UNet2DConditionModel(**merged).eval().requires_grad_(False)


def ask(unet):
    c = make_conditioning(3)
    with torch.no_grad():
        return unet(
            randn(3, 4, 8, 8), torch.tensor([999, 499, 9]), encoder_hidden_states=c.encoder_hidden_states
        ).sample


PARTS = [
    "level.0.pair.1",
    "level.0.pair.2",
    "level.1.pair.1",
    "level.1.pair.2",
    *(f"level.1.{side}.layer.{k}" for side in ("encoder", "decoder") for k in range(3)),
    MIDDLE_END,
    MIDDLE,
]
BOTH = [f"level.1.layer.{k}" for k in range(3)]


def test_every_part_that_can_be_removed_is_named():
    assert removable(plain_config(unet_of())) == PARTS
    plain = plain_config(unet_of(layers_per_block=1, transformer_layers_per_block=1))
    decoder = "level.1.decoder.layer.0"  # the encoder's only one stays
    assert removable(plain) == [decoder, MIDDLE_END, MIDDLE]
    assert removable(plain | {"mid_block_type": "UNetMidBlock2D"}) == [decoder, MIDDLE]
    assert removable(plain | {"mid_block_type": None}) == [decoder]


@pytest.mark.parametrize(
    "removed",
    [
        *([part] for part in [*PARTS, *BOTH]),
        [*PARTS[:6], MIDDLE_END],
        [*PARTS[1:4:2], *BOTH[1:], MIDDLE],
        PARTS[7:10],
        [BOTH[0], PARTS[8]],
    ],
)
def test_the_smaller_network_is_built_by_diffusers_from_its_config_and_the_originals_weights(removed):
    whole = unet_of()
    smaller = smaller_network(whole, removed)
    built = UNet2DConditionModel.from_config(smaller.config)
    built.load_state_dict(smaller.state_dict())
    assert parameters_of(smaller) < parameters_of(whole)
    assert torch.equal(ask(built.eval()), ask(smaller))
    pointers = {tensor.data_ptr() for tensor in whole.state_dict().values()}
    assert all(tensor.data_ptr() in pointers for tensor in smaller.state_dict().values())


def test_a_layer_that_changes_nothing_can_be_removed_without_a_change():
    """Transformer block 1 of every attention at level 1 adds zero, so without it the output is equal to the bit; and block 2
    then has its place."""
    whole = unet_of()
    for name, module in whole.named_modules():
        if name.endswith("transformer_blocks.1"):
            for last in (module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]):
                last.weight.zero_()
                last.bias.zero_()
    assert torch.equal(ask(smaller_network(whole, ["level.1.layer.1"])), ask(whole))
    assert not torch.equal(ask(smaller_network(whole, ["level.1.layer.2"])), ask(whole))
    config = plain_config(whole)
    inside = "down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_q.weight"
    assert source_name(config, ["level.1.layer.1"], inside.format(1)) == inside.format(2)
    assert source_name(config, ["level.1.layer.1"], f"mid_block{inside[13:].format(1)}") == (
        f"mid_block{inside[13:].format(2)}"
    )


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_layer_of_one_side_leaves_the_other_sides_where_they_are(side):
    """Without effect in the decoder alone, block 1 of the decoder can go, block 1 of the encoder cannot; and the reverse."""
    whole = unet_of()
    for name, module in whole.named_modules():
        if name.endswith("transformer_blocks.1") and name.startswith("up") == (side == "decoder"):
            for last in (module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]):
                last.weight.zero_()
                last.bias.zero_()
    other = {"encoder": "decoder", "decoder": "encoder"}[side]
    assert torch.equal(ask(smaller_network(whole, [f"level.1.{side}.layer.1"])), ask(whole))
    assert not torch.equal(ask(smaller_network(whole, [f"level.1.{other}.layer.1"])), ask(whole))


def test_a_pair_that_changes_nothing_can_be_removed_without_a_change():
    """At the first level, which has no attention, encoder block 2 returns its input; decoder block 2 reads the skip that is
    left, and its output is that of the original if both skips are equal."""
    whole = unet_of()
    block = whole.down_blocks[0].resnets[2]
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    smaller = smaller_network(whole, ["level.0.pair.2"])
    kept = [id(resnet) for resnet in whole.down_blocks[0].resnets]
    assert len(kept) == 3
    assert len(smaller.down_blocks[0].resnets) == 2
    assert len(smaller.up_blocks[1].resnets) == 3
    x, emb = randn(3, 16, 8, 8), randn(3, 64)
    with torch.no_grad():
        assert torch.equal(whole.down_blocks[0](x, emb)[0], smaller.down_blocks[0](x, emb)[0])
    names = [f"up_blocks.1.resnets.{k}.conv1.weight" for k in range(3)]
    sources = [source_name(plain_config(whole), ["level.0.pair.2"], name) for name in names]
    assert sources == [f"up_blocks.1.resnets.{k}.conv1.weight" for k in (0, 1, 3)]


@pytest.mark.slow
def test_the_released_models_lose_what_bk_sdm_removed():
    """BK-SDM-Base is SD1.5 without a pair at each level, 580 M of 860 M parameters, and BK-SDM-Small without the mid-block
    too, 483 M (arXiv 2305.15798, Table 1)."""
    config = plannable_facts(load_config("configs/sd15.yaml")).unet
    pairs = [f"level.{level}.pair.1" for level in range(4)]

    def count(removed):
        with torch.device("meta"):
            return parameters_of(UNet2DConditionModel.from_config(smaller_config(config, removed)))

    assert count([]) == pytest.approx(860e6, rel=0.001)
    assert count(pairs) == pytest.approx(580e6, rel=0.002)
    assert count([*pairs, MIDDLE]) == pytest.approx(483e6, rel=0.002)


def test_parts_with_the_least_error_per_parameter_go_first():
    whole = unet_of()
    table = list(removals(whole, OutputError(whole, lambda model: [ask(model)])))
    assert [removal.part for removal in table] == PARTS
    expected = ask(whole)
    for removal in table:
        smaller = smaller_network(whole, [removal.part])
        assert removal.parameters == parameters_of(whole) - parameters_of(smaller)
        error = (ask(smaller) - expected).norm() / expected.norm()
        assert removal.error == pytest.approx(float(error), rel=1e-5)
    order = [r.part for r in sorted(table, key=lambda r: r.error / r.parameters)]
    removed = chosen(whole, table, 0.7)
    assert parameters_of(smaller_network(whole, removed)) <= 0.7 * parameters_of(whole)
    assert parameters_of(smaller_network(whole, removed[:-1])) > 0.7 * parameters_of(whole)
    assert removed == [part for part in order if part in removed]
    text = sensitivity_table(table, removed)
    assert text.count("| removed |") == len(removed)
    assert text.splitlines()[2].startswith(f"| {order[0]} |")


def test_a_share_that_leaves_nothing_is_refused():
    whole = unet_of()
    table = [Removal(part, 1, 1.0) for part in PARTS]
    with pytest.raises(
        ConfigError, match=r"shrink.keep: got 0.05, but without every part .* allowed: 0\.\d+ or more"
    ):
        chosen(whole, table, 0.05)


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        (
            ["level.0.pair.0"],
            r"got 'level.0.pair.0', which is no part of this U-Net or must stay in it; allowed: level",
        ),
        (["level.0.layer.0"], r"got 'level.0.layer.0'"),
        (BOTH, r"got all 3 layers of level 1's encoder; allowed: at most 2"),
        (["level.1.layer.0", *PARTS[5:7]], r"got all 3 layers of level 1's encoder; allowed: at most 2"),
    ],
)
def test_parts_that_cannot_be_removed_are_refused(removed, text):
    with pytest.raises(ConfigError, match=text):
        smaller_config(plain_config(unet_of()), removed)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["shrink={}"], r"shrink: got neither of remove and keep"),
        (
            ["shrink={remove: [middle], keep: 0.6}"],
            r"shrink: got both of remove and keep; .* shrink.remove=\[\]",
        ),
        (["shrink={remove: [middle, middle]}"], r"shrink.remove: got 'middle' twice"),
        (
            ["shrink={remove: [middle.end, middle]}"],
            r"shrink.remove: got 'middle.end' beside 'middle', which has it",
        ),
        (
            ["shrink={remove: [level.2.layer.7, level.2.decoder.layer.7]}"],
            r"shrink.remove: got 'level.2.decoder.layer.7' beside 'level.2.layer.7', which has it",
        ),
        (["shrink={keep: 1.5}"], r"shrink.keep: got 1.5"),
        (["shrink={remove: [head]}"], r"shrink.remove.0: got 'head'"),
        (
            ["shrink={keep: 0.5, objectives: [{kind: mse}]}"],
            r"shrink.objectives.0.kind: got 'mse'; allowed: output, denoise",
        ),
        (["shrink={keep: 0.5, objectives: [{kind: l2}, {kind: l2}]}"], r"shrink.objectives: got l2 twice"),
        (["shrink={keep: 0.5}", "teachers=[{name: a}]"], r"teachers: got a value beside shrink"),
        (
            ["shrink={keep: 0.5, objectives: [{kind: l2, taps: [down_blocks.0]}]}"],
            r"shrink.objectives.0.taps: got 'down_blocks.0', .* allowed: encoder, middle, decoder",
        ),
        (["shrink={keep: 0.5, objectives: [{kind: l2, weight: 0}]}"], r"shrink.objectives.0.weight: got 0"),
        (
            [
                "shrink={keep: 0.5}",
                "ladder.0.phases.0={objectives: [{kind: mse}, {kind: l2, taps: [up_blocks.0]}]}",
            ],
            r"ladder.0.phases.0.objectives: got the tap 'up_blocks.0'",
        ),
        (
            [
                "shrink={keep: 0.5, objectives: [{kind: relations, between: samples}]}",
                "training.train_batch_size=1",
            ],
            r"shrink.objectives: got relations between samples with a training.train_batch_size of 1",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, text):
    with pytest.raises(ConfigError, match=text):
        load_config("configs/letters.yaml", overrides)


def test_the_original_is_not_changed():
    whole = unet_of()
    before = copy.deepcopy(whole.state_dict())
    smaller = copy.deepcopy(smaller_network(whole, [MIDDLE]))
    for parameter in smaller.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


def test_what_does_not_fit_is_found_before_anything_is_trained():
    """By doctor, prepare and run: parts that the U-Net has not, a share that is too small, taps that nothing is left of."""
    facts = TeacherFacts.of_folder(embedded_folder("teacher"))

    def check(*overrides):
        config = load_config("configs/letters.yaml", list(overrides))
        check_shrink_fits(config, facts)
        check_training(config, facts)

    check("shrink={remove: [middle]}")
    check("shrink={keep: 0.75}")
    with pytest.raises(ConfigError, match=r"shrink.remove: got 'level.0.pair.9'"):
        check("shrink={remove: [level.0.pair.9]}")
    with pytest.raises(
        ConfigError, match=r"shrink.keep: got 0.5, .* 0.584 of the parameters are left; allowed: 0.584"
    ):
        check("shrink={keep: 0.5}")
    with pytest.raises(
        ConfigError, match=r"shrink.objectives.0.taps: got 'middle', but this network has no middle"
    ):
        check("shrink={remove: [middle], objectives: [{kind: l2}]}")
    with pytest.raises(
        ConfigError, match=r"ladder.1.phases.0.objectives.0.taps: got 'middle', but this network"
    ):
        check("shrink={remove: [middle]}", "ladder.1.phases.0={objective: l2}")


def test_modules_of_uneven_levels_have_the_original_repositorys_names():
    """Blocks are counted on: after a level of one pair comes the next number."""
    uneven = plain_config(smaller_network(unet_of(layers_per_block=2), ["level.0.pair.1"]))
    assert uneven["layers_per_block"] == [1, 2]
    assert sgm_name("down_blocks.0.resnets.0.conv1", uneven) == "input_blocks.1.0.in_layers.2"
    assert sgm_name("down_blocks.0.downsamplers.0.conv", uneven) == "input_blocks.2.0.op"
    assert sgm_name("down_blocks.1.attentions.1.proj_in", uneven) == "input_blocks.4.1.proj_in"
    assert sgm_name("up_blocks.0.resnets.2.conv1", uneven) == "output_blocks.2.0.in_layers.2"
    assert sgm_name("up_blocks.1.resnets.0.conv1", uneven) == "output_blocks.3.0.in_layers.2"
    even = plain_config(unet_of(layers_per_block=2))
    for module in ("down_blocks.1.attentions.1.proj_in", "up_blocks.1.resnets.2.conv1"):
        assert sgm_name(module, even) == sgm_name(module, even | {"layers_per_block": [2, 2]})
