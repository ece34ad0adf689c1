"""The base in 8 and 4 bits: the estimated memory, nearly the same outputs, and a LoRA that a vanilla pipeline loads."""

import copy
import importlib.util

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from eval.random_teacher import build
from stepdistill.config import ConfigError
from stepdistill.data.prepare import prepare
from stepdistill.export.fused import fused_unet
from stepdistill.export.onnx_unet import inputs_of
from stepdistill.ladder import base_network, distill, load_shared, read_rung_lora
from stepdistill.models.lora_file import read_lora
from stepdistill.models.network.kind import load_network
from stepdistill.plan.dry_update import base_bytes
from stepdistill.runtime import Runtime
from stepdistill.stages import prepare as prepare_stage
from stepdistill.teacher.quantization import NF4_BLOCK, quantization_config, quantized_bytes
from tests.integration.conftest import tiny_config
from tests.integration.exported import unet_output

INT8 = "training.base_quantization=int8"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.slow
def test_a_rung_is_trained_and_exported_on_a_quantised_base(tmp_path, kind):
    teacher = tmp_path / "teacher"
    build("sdxl", tiny=True).save_pretrained(teacher)
    options = (f"teacher.path={teacher}", "data.num_images=8", "training.mixed_precision=bf16")
    phases = "[{objective: mse, max_train_steps: 2}, {objective: single, max_train_steps: 2}]"
    ladder = f"ladder=[{{teacher_steps: 2, student_steps: 1, phases: {phases}}}]"
    config = tiny_config(tmp_path, *options, f"training.base_quantization={kind}", ladder)
    prepare(config)
    assert distill(config) == [1]
    weights = read_rung_lora(config.run_dir, 1)
    assert any(bool(tensor.any()) for key, tensor in weights.items() if "lora_B" in key)
    pipeline = StableDiffusionXLPipeline.from_pretrained(teacher, dtype=torch.float32)
    pipeline.load_lora_weights(config.run_dir / "rungs" / "1")
    inputs = inputs_of(pipeline.unet, 2, tokens=10)
    loaded, merged, bare = (
        unet_output(unet, inputs)
        for unet in (
            pipeline.unet,
            fused_unet(teacher, read_lora(config.run_dir / "rungs" / "1")),
            load_network(teacher),
        )
    )
    assert torch.allclose(loaded, merged, atol=1e-5)
    assert float((loaded - bare).abs().max()) > 1e-4


@pytest.mark.slow
def test_the_int8_base_is_within_rounding_of_the_base_and_has_the_estimated_size(tmp_path):
    teacher = tmp_path / "teacher"
    build("sdxl", tiny=True).save_pretrained(teacher)
    full, small = (load_network(teacher, quantization=kind) for kind in ("none", "int8"))
    assert not any(parameter.requires_grad for parameter in small.parameters())
    stored_bytes = sum(
        (p.qdata.nbytes + p.scale.nbytes) if hasattr(p, "qdata") else p.nbytes for p in small.parameters()
    )
    assert stored_bytes == base_bytes(full.modules(), "int8")
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Linear):
            exact = full.get_submodule(name).weight
            # One step of int8 is 1 / 127 of the row's largest absolute value; the rounding error is at most half a step.
            most = exact.abs().amax(dim=1, keepdim=True) / 127 * 0.51
            assert bool(((module.weight.dequantize() - exact).abs() <= most).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_nearest_of_16_quantiles_and_has_the_estimated_size(dtype):
    quantize_ = pytest.importorskip("torchao.quantization").quantize_
    torch.manual_seed(0)
    exact = torch.nn.Linear(320, 320, dtype=dtype)
    layer = copy.deepcopy(exact)
    quantize_(layer, quantization_config("nf4"))
    packed = layer.weight
    held = [getattr(packed, name) for name in packed.__tensor_flatten__()[0]]
    assert sum(tensor.nbytes for tensor in held) == quantized_bytes(exact, "nf4")
    # The quantiles of QLoRA's appendix E lie at most .3039 apart: an error of at most half of that times the block's scale,
    # whose own 8 bits and rounding add a hundredth.
    blocks = exact.weight.detach().float().reshape(-1, NF4_BLOCK)
    stored = packed.get_original_weight()
    off = (stored.float().reshape(-1, NF4_BLOCK) - blocks).abs() / blocks.abs().amax(dim=1, keepdim=True)
    assert float(off.max()) <= 0.3039 / 2 + 0.01
    assert float(off.max()) > 0.1


def test_a_layer_that_nf4_does_not_divide_stays_as_it_is():
    quantize_ = pytest.importorskip("torchao.quantization").quantize_
    layer = torch.nn.Linear(20, 20)
    before = layer.weight
    quantize_(layer, quantization_config("nf4"))
    assert layer.weight is before
    assert quantized_bytes(layer, "nf4") == before.nbytes


def test_nf4_in_float16_is_refused(tmp_path):
    """The scales of weights of a deviation of .0005 overflow: their error doubled from .09 to .18."""
    with pytest.raises(
        ConfigError, match=r"base_quantization: got nf4 with mixed_precision fp16.*allowed: int8"
    ):
        tiny_config(tmp_path, "training.base_quantization=nf4", "training.mixed_precision=fp16")


def test_without_torchao_the_remedy_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name)
    )
    config = tiny_config(tmp_path, "data.num_images=4", INT8)
    with pytest.raises(
        ConfigError, match=r'base_quantization: got int8.*pip install "stepdistill\[quantize\]"'
    ):
        prepare_stage(config)
    assert not config.run_dir.exists()


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.slow
def test_a_base_that_the_quantisation_changes_too_much_is_refused(tmp_path, monkeypatch, caplog, kind):
    config = tiny_config(tmp_path, "data.num_images=4", f"training.base_quantization={kind}")
    prepare(config)
    with caplog.at_level("INFO"):
        load_shared(config, Runtime(mixed_precision="bf16"))
    assert f"the base model in {kind}: its output is {'1' if kind == 'nf4' else '0'}." in caplog.text
    monkeypatch.setattr(base_network, "MAX_QUANTIZATION_ERROR", 1e-4)
    with pytest.raises(
        ConfigError, match=rf"with {kind} the output of this model is [01].\d% off; allowed: up to 0%"
    ):
        load_shared(config, Runtime(mixed_precision="bf16"))
