"""The base in 8 bits: the estimated memory, nearly the same outputs, and a LoRA that a vanilla pipeline loads."""

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
from tests.integration.conftest import tiny_config
from tests.integration.exported import unet_output

INT8 = "training.base_quantization=int8"


@pytest.mark.slow
def test_a_rung_is_trained_and_exported_on_an_int8_base(tmp_path):
    teacher = tmp_path / "teacher"
    build("sdxl", tiny=True).save_pretrained(teacher)
    options = (f"teacher.path={teacher}", "data.num_images=8", "training.mixed_precision=bf16")
    phases = "[{objective: mse, max_train_steps: 2}, {objective: single, max_train_steps: 2}]"
    ladder = f"ladder=[{{teacher_steps: 2, student_steps: 1, phases: {phases}}}]"
    config = tiny_config(tmp_path, *options, INT8, ladder)
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


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.slow
def test_a_base_that_the_quantisation_changes_too_much_is_refused(tmp_path, monkeypatch, caplog, kind):
    config = tiny_config(tmp_path, "data.num_images=4", f"training.base_quantization={kind}")
    prepare(config)
    with caplog.at_level("INFO"):
        load_shared(config, Runtime(mixed_precision="bf16"))
    assert f"the base model in {kind}: its output is 0." in caplog.text
    monkeypatch.setattr(base_network, "MAX_QUANTIZATION_ERROR", 1e-4)
    with pytest.raises(
        ConfigError, match=rf"with {kind} the output of this model is 0.\d% off; allowed: up to 0%"
    ):
        load_shared(config, Runtime(mixed_precision="bf16"))
