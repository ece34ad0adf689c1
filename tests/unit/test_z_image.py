"""Z-Image's transformer: texts of different lengths as a mask, equal to its own forward pass; the roles of a run."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from stepdistill.config import Phase
from stepdistill.diffusion.rectified_flow import RectifiedFlow
from stepdistill.models import adapters
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.network.conditioning import MASK, Conditioning
from stepdistill.models.network.z_image import ZImageKind
from stepdistill.models.shared_network import DISCRIMINATOR, STUDENT, TEACHER, SharedNetwork
from tests.conftest import randn
from tests.unit.test_gradients import Pair, fill, grads
from tests.unit.test_sd3 import make_batch, separate

PATH = RectifiedFlow(6.0)
SIZES = {"in_channels": 4, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
SIZES |= {"cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [128, 16, 16]}


def build(**options):
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(**SIZES | options)
    for (
        parameter
    ) in network.parameters():  # the learned tokens begin at 0, and would hide what fills up a row
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)


def conditioning(lengths=(3, 40, 32), tokens=64):
    hidden = randn(len(lengths), tokens, 12, seed=5)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return Conditioning(hidden * mask[..., None], {MASK: mask})


@pytest.mark.parametrize(
    ("lengths", "tokens"), [((3, 40, 32), 64), ((3, 32, 7), 32), ((3, 7, 5), 64), ((40, 64, 33), 64)]
)
@pytest.mark.parametrize("size", [(8, 8), (6, 12), (2, 4)])
def test_the_velocity_is_minus_what_the_networks_own_forward_pass_gives(lengths, tokens, size):
    network, texts = build(), conditioning(lengths, tokens)
    sample, times = randn(3, 4, *size), PATH.network_times(torch.tensor([999, 499, 9]))
    ours = ZImageKind().ask(network, sample, times, texts)
    rows = [row[:length] for row, length in zip(texts.encoder_hidden_states, lengths, strict=True)]
    theirs = network([*sample.unsqueeze(2)], (1000 - times) / 1000, rows, return_dict=False)[0]
    assert torch.allclose(ours, -torch.stack(theirs).squeeze(2), atol=1e-6)


def test_what_fills_a_row_up_changes_nothing():
    network, sample, times = build(), randn(3, 4, 8, 8), torch.tensor([1000.0, 700.0, 20.0])
    texts = conditioning((3, 20, 32), 32)
    expected = ZImageKind().ask(network, sample, times, texts)
    garbage = torch.where(texts.added_cond_kwargs[MASK][..., None], texts.encoder_hidden_states, 9.0)
    for other in (Conditioning(garbage, texts.added_cond_kwargs), texts.filled_up(96)):
        assert torch.allclose(ZImageKind().ask(network, sample, times, other), expected, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 4, 9])
def test_features_are_the_image_tokens_after_layers_of_the_whole_network(layers):
    kind, network, tokens = ZImageKind(), build(n_layers=layers), []
    for layer in network.layers:
        layer.register_forward_hook(lambda _m, _i, out: tokens.append(out))
    sample, times = randn(3, 4, 6, 10), PATH.network_times(torch.tensor([999, 499, 9]))
    kind.ask(network, sample, times, conditioning())
    depths = {1: [1], 4: [1, 2, 3], 9: [2, 4, 6]}[layers]
    expected = [tokens[depth - 1][:, :15].transpose(1, 2).reshape(3, 32, 3, 5) for depth in depths]
    for encoder in (build(n_layers=layers), kind.encoder_copy(network)):
        features = kind.features(encoder, sample, times, conditioning())
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert kind.feature_shapes(network, 6) == [(32, 3)] * len(depths)
    assert torch.equal(kind.image_part(network, tokens[0], (6, 10)), tokens[0][:, :15])


def test_lora_covers_attention_and_feed_forward_layers_and_the_discriminators_those_that_features_run():
    network = build()
    adapters.add_adapter(network, STUDENT, rank=4, seed=0, targets=ZImageKind.lora_targets)
    carried = {n for n, m in network.named_modules() if m in adapters.lora_layers(network)}
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    projections = {
        n
        for n, m in build().named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith(blocks) and "adaLN" not in n
    }
    assert carried == projections
    network = build()
    adapters.add_adapter(
        network, DISCRIMINATOR, rank=4, seed=0, targets=ZImageKind().encoder_lora_targets(network)
    )
    carried = {n for n, m in network.named_modules() if m in adapters.lora_layers(network)}
    assert carried == {n for n in projections if not n.startswith("layers.3")}


def make_pair(*, checkpointing=False, **options):
    network = SharedNetwork.with_student_and_teacher(
        build(), rank=4, seed=0, gradient_checkpointing=checkpointing, **options
    )
    fill(network, STUDENT, 100)
    fill(network, TEACHER, 200)
    none = conditioning((5,), 32)
    teacher = Denoiser(network, TEACHER, PATH, "velocity", guidance_scale=4.0, unconditional=none)
    return Pair(Denoiser(network, STUDENT, PATH, "velocity", trains=True), teacher)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["mse", "paired", "single"])
def test_gradients_equal_those_of_separate_networks(checkpointing, objective):
    shared, batch = make_pair(checkpointing=checkpointing), make_batch(conditioning())
    alone = Pair(separate(shared.student, build), separate(shared.teacher, build))
    options = {"rank": 4, "seed": 3, "sample_size": 8, "trunk": "lora", "heads": "multi"}
    options["paired"] = objective == "paired"
    discriminators = [None, None]
    if objective != "mse":
        discriminators = [
            Discriminator(network, base=build(), **options)
            for network in (shared.network, SharedNetwork(build()))
        ]
        fill(shared.network, DISCRIMINATOR, 300)
        discriminators[1].load_state(discriminators[0].state())
    ours, theirs = (
        pair.losses(batch, Phase(objective=objective), discriminator)
        for pair, discriminator in zip((shared, alone), discriminators, strict=True)
    )
    for role in ours.by_role:
        ours.by_role[role].backward()
        theirs.by_role[role].backward()
        assert torch.allclose(ours.by_role[role], theirs.by_role[role], rtol=1e-6)
    pairs = [(shared.student_parameters, alone.student_parameters)]
    if objective != "mse":
        pairs.append((discriminators[0].trained.values(), discriminators[1].trained.values()))
    for parameters, others in pairs:
        scale = max(g.abs().max().item() for g in grads(others))
        assert scale > 1e-5
        for gradient, other in zip(grads(parameters), grads(others), strict=True):
            assert torch.allclose(gradient, other, atol=1e-6 * max(1.0, scale))


def test_taps_name_thirds_of_the_layers_or_modules_that_the_image_passes():
    kind, network = ZImageKind(), build()
    places = [kind.modules_at(network, place) for place in ("encoder", "middle", "decoder")]
    assert places == [["layers.0"], ["layers.1", "layers.2"], ["layers.3"]]
    assert kind.modules_at(network, "noise_refiner.0") == ["noise_refiner.0"]
    for name in ("context_refiner.0", "t_embedder", "layers.0.adaLN_modulation"):
        with pytest.raises(ValueError, match="which the image's tokens do not pass"):
            kind.modules_at(network, name)


def test_what_fills_up_every_row_is_cut_and_full_rows_need_no_mask(monkeypatch):
    texts, network, times = conditioning((40, 35), 96), build(), torch.tensor([900.0, 30.0])
    cut = texts.cut()
    assert (cut.encoder_hidden_states.shape[1], cut.least_tokens) == (64, 35)
    assert Conditioning.concat(cut, cut).rows(torch.tensor([1])).least_tokens == 35
    assert Conditioning(randn(2, 5, 12)).cut().encoder_hidden_states.shape[1] == 5
    seen = []
    layer = network.layers[0]
    layer.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[1]))
    sample = randn(2, 4, 8, 8)
    expected = ZImageKind().ask(network, sample, times, texts)
    assert torch.allclose(ZImageKind().ask(network, sample, times, cut), expected, atol=1e-6)
    assert seen[0] is not None
    assert seen[1] is None


def test_rows_without_prompt_have_the_length_of_the_empty_text():
    texts, none = conditioning(), conditioning((5,), 32)
    mixed = texts.without_prompts(torch.tensor([False, True, False]), none)
    assert mixed.added_cond_kwargs[MASK].sum(1).tolist() == [3, 5, 32]
    assert torch.equal(mixed.encoder_hidden_states[1, :32], none.encoder_hidden_states[0])
    assert torch.equal(mixed.encoder_hidden_states[[0, 2]], texts.encoder_hidden_states[[0, 2]])
    both = Conditioning.concat(none.beside(texts), texts)
    assert both.added_cond_kwargs[MASK].sum(1).tolist() == [5, 5, 5, 3, 40, 32]
    assert both.to("cpu", torch.bfloat16).added_cond_kwargs[MASK].dtype == torch.bool
