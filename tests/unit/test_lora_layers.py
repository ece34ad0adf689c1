"""Our LoRA layers compute what peft's compute, in fewer operations, and all of them switch at once."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eval.random_teacher import unet_config
from stepdistill.models import adapters
from stepdistill.models.lora_layers import LoraConv2d, LoraLinear, lora_config
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.unet import LORA_TARGETS
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork
from stepdistill.plan.cards import CARDS
from stepdistill.plan.tracker import Tracker, gpu_kernels
from stepdistill.teacher.quantization import dequantized, quantization_config
from tests.conftest import build_tiny_unet, make_conditioning, randn
from tests.unit.test_gradients import fill, make_network

KERNELS_OF_SDXL = {None: 1856, STUDENT: 3421}


class Operations(TorchDispatchMode):
    """The operations that reach the device, without views."""

    VIEWS = (
        "view",
        "t",
        "transpose",
        "permute",
        "expand",
        "detach",
        "_unsafe_view",
        "slice",
        "alias",
        "split",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def with_pefts_layers(state):
    """A U-Net with an adapter of peft's own layers."""
    unet = build_tiny_unet()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(LORA_TARGETS))
    unet.add_adapter(config, adapter_name=STUDENT)
    set_peft_model_state_dict(unet, dict(state), adapter_name=STUDENT)
    return unet


def run(unet, inputs):
    x, t, c = inputs
    return unet(x, t, encoder_hidden_states=c.encoder_hidden_states).sample


def trained_gradients(unet, loss):
    parameters = adapters.adapter_parameters(unet, STUDENT)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_equal_those_of_pefts_layers(memory_format):
    network = make_network()
    state = fill(network, STUDENT, 100)
    theirs = with_pefts_layers(state)
    inputs = (randn(2, 4, 8, 8), torch.tensor([999, 9]), make_conditioning(2))
    network.model.to(memory_format=memory_format)
    with network.using(STUDENT):
        ours = run(network.model, inputs)
    expected = run(theirs, inputs)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = trained_gradients(network.model, ours.square().sum())
    others = trained_gradients(theirs, expected.square().sum())
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], rtol=1e-4, atol=1e-3), name


def test_keys_and_weights_are_those_that_peft_saves():
    network = make_network()
    fill(network, STUDENT, 100)
    theirs = get_peft_model_state_dict(network.model, adapter_name=STUDENT)
    ours = network.adapter_state(STUDENT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_state_of_another_rank_is_refused():
    network, other = make_network(), SharedNetwork(build_tiny_unet())
    other.add_adapter(STUDENT, rank=8, seed=0)
    with pytest.raises(ValueError, match="does not fit this U-Net and rank"):
        network.load_adapter_state(STUDENT, other.adapter_state(STUDENT))


def layer_of(kind, **options):
    holder = torch.nn.ModuleDict({"layer": kind(8, 16, **options)}).requires_grad_(False)
    from peft import inject_adapter_in_model

    from stepdistill.models.lora_layers import lora_config

    inject_adapter_in_model(lora_config(4, targets=["layer"]), holder, STUDENT)
    return holder["layer"]


def operations_of(layer, x):
    with Operations() as counted, torch.no_grad():
        layer(x)
    return counted.names


@pytest.mark.parametrize("active", [None, STUDENT])
def test_an_adapter_costs_two_operations(active):
    linear, conv = layer_of(torch.nn.Linear), layer_of(torch.nn.Conv2d, kernel_size=3, padding=1)
    assert isinstance(linear, LoraLinear)
    assert isinstance(conv, LoraConv2d)
    convolutions = ["convolution", "convolution"]
    for layer, x, expected in (
        (linear, randn(2, 5, 8), ["addmm", "mm", "addmm"]),
        (linear, randn(5, 8), ["addmm", "mm", "addmm"]),
        (conv, randn(2, 8, 6, 6), [*convolutions, "baddbmm"]),
        (conv, randn(2, 8, 6, 6).to(memory_format=torch.channels_last), [*convolutions, "addmm"]),
    ):
        layer.active.name = active
        assert operations_of(layer.bfloat16(), x.bfloat16()) == (expected if active else expected[:1])


def test_many_rows_in_float32_go_through_the_merged_weight():
    """Forming W + B A costs as much as the product with some rows; in bfloat16 it would lose B A."""
    linear = layer_of(torch.nn.Linear)  # 8 -> 16, rank 4: merged from 4 * 8 * 16 / (4 * 24) = 5.3 rows on
    linear.active.name = STUDENT
    assert operations_of(linear, randn(5, 8)) == ["addmm", "mm", "addmm"]
    assert operations_of(linear, randn(6, 8)) == ["addmm", "addmm"]
    conv = layer_of(torch.nn.Conv2d, kernel_size=3, padding=1)
    conv.active.name = STUDENT
    assert operations_of(conv, randn(1, 8, 6, 6)) == ["mm", "add", "convolution"]
    assert operations_of(linear.bfloat16(), randn(600, 8).bfloat16()) == ["addmm", "mm", "addmm"]


@pytest.mark.parametrize("rows", [5, 600])
@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.nn.Conv2d])
def test_both_ways_give_the_same_outputs_and_gradients(kind, rows, monkeypatch):
    options = {} if kind is torch.nn.Linear else {"kernel_size": 3, "padding": 1}
    layer = layer_of(kind, **options)
    layer.active.name = STUDENT
    torch.nn.init.normal_(layer.lora_B[STUDENT].weight)
    x = randn(rows, 8) if kind is torch.nn.Linear else randn(rows, 8, 3, 3)
    results = []
    for merged in (True, False):
        monkeypatch.setattr(type(layer), "_is_cheaper_merged", lambda *_args, merged=merged: merged)
        leaves = [x.clone().requires_grad_(True), layer.lora_A[STUDENT].weight, layer.lora_B[STUDENT].weight]
        for leaf in leaves:
            leaf.requires_grad_(True)
        y = layer(leaves[0])
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_convolution_of_another_kind_is_refused():
    for options in ({"groups": 2}, {"padding_mode": "circular"}):
        with pytest.raises(ValueError, match="allowed: groups=1, padding_mode='zeros'"):
            layer_of(torch.nn.Conv2d, kernel_size=3, padding=1, **options)


def test_all_layers_read_one_object_also_after_adapters_come_and_go():
    network = make_network()
    network.add_adapter("third", rank=2, seed=1, encoder_only=True)
    network.remove_adapter("third")
    layers = adapters.lora_layers(network.model)
    assert len({id(layer.active) for layer in layers}) == 1
    with network.using(TEACHER):
        assert {layer.active.name for layer in layers} == {TEACHER}
    assert {layer.active.name for layer in layers} == {None}
    before = {name: p.requires_grad for name, p in network.model.named_parameters()}
    with network.using(STUDENT, frozen=[STUDENT]):
        assert {name: p.requires_grad for name, p in network.model.named_parameters()} == before


def kernels_of(family, adapter):
    """The kernels of one forward pass of a U-Net of full size in bfloat16, without views."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(family)).to(torch.bfloat16).eval().requires_grad_(False)
        network = SharedNetwork(unet)
        network.add_adapter(STUDENT, rank=64, seed=0)
        hidden = torch.empty(1, 77, unet.config.cross_attention_dim, dtype=torch.bfloat16)
        added = {"text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(1, 6)}
        conditioning = Conditioning(hidden, added if family == "sdxl" else {})
        side = unet.config.sample_size
        sample, timesteps = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.int64)
    with gpu_kernels(), Tracker(CARDS["h100"]) as tracker, torch.no_grad(), network.using(adapter):
        network.ask(sample, timesteps, conditioning)
    return tracker.work["all"].kernels


@pytest.mark.slow
def test_the_kernels_of_a_forward_pass_at_full_size():
    """Two more for each layer that a LoRA adapts, and none to cast; peft's layers under autocast took 8,931."""
    assert {adapter: kernels_of("sdxl", adapter) for adapter in (None, STUDENT)} == KERNELS_OF_SDXL


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("role", [None, STUDENT])
def test_a_quantised_layer_keeps_no_converted_weight_and_has_the_converted_weights_gradients(kind, role):
    """Its weight is larger than all that its backward pass needs besides."""
    torchao = pytest.importorskip("torchao.quantization")
    plain = nn.Linear(256, 128).bfloat16().requires_grad_(False)
    quantized = nn.Sequential(copy.deepcopy(plain))
    torchao.quantize_(quantized, quantization_config(kind))
    plain.weight.data = dequantized(quantized[0].weight).detach()

    def outcome(base):
        model = nn.Sequential(base)
        config = lora_config(4, targets=["0"])
        layer = get_peft_model(model, config).base_model.model[0]
        layer.active.name = role and "default"
        torch.manual_seed(0)
        trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for parameter in trained:
            parameter.data = torch.randn(parameter.shape).bfloat16()
        x, saved = randn(6, 256).bfloat16().requires_grad_(True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            y = layer(x)
        y.float().square().sum().backward()
        return y, [x.grad, *(p.grad for p in trained if role)], saved

    expected, gradients, _ = outcome(plain)
    y, found, saved = outcome(quantized[0])
    assert torch.allclose(y, expected, rtol=0.02, atol=0.02)
    for gradient, of in zip(found, gradients, strict=True):
        assert float((gradient - of).float().norm() / of.float().norm()) < 0.02
    assert max(saved, default=0) < plain.weight.numel()
