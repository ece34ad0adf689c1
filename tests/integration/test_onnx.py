"""The ONNX U-Net: onnxruntime's output equals torch's, also at other batch sizes than the traced one. Needs extra "onnx"."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed
from stepdistill.evaluation.draw.rows import Row
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.export import onnx_unet
from stepdistill.export.fused import fused_unet
from stepdistill.export.rung import export_rung
from stepdistill.models.lora_file import read_lora
from stepdistill.run.rungs import rung_folder
from stepdistill.teacher.source import teacher_facts
from tests.integration.conftest import tiny_config
from tests.integration.exported import rung_of


@pytest.mark.slow
def test_onnxruntime_computes_what_torch_does(tmp_path):
    """For SDXL's classes, with the inputs that SD1.5's lack; the test of int8 exports SD1.5's."""
    pytest.importorskip("onnxruntime")
    config, teacher, _ = rung_of(tmp_path, "sdxl", "export.formats=[onnx]")
    folder = export_rung(config, 4)
    content = (folder / "onnx" / "unet.onnx").read_bytes()
    for place in (tmp_path, Path(onnx_unet.__file__).parent, Path(torch.__file__).parent):
        assert str(place).encode() not in content
    unet = fused_unet(teacher, read_lora(folder))
    module = onnx_unet._Named(unet.eval())
    for batch, size in ((1, (16, 24)), (5, (32, 16))):
        inputs = onnx_unet.inputs_of(unet, batch, tokens=77, seed=batch)
        inputs["sample"] = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(2))
        assert onnx_unet.difference(folder / "onnx" / "unet.onnx", module, inputs) < 1e-4
    other = onnx_unet._Named(fused_unet(teacher, read_lora(folder)).eval())
    other.unet.conv_in.weight.data += 0.01
    assert onnx_unet.difference(folder / "onnx" / "unet.onnx", other, inputs) > 1e-3


def test_without_its_packages_the_remedy_is_named(tmp_path, monkeypatch):
    config, _, _ = rung_of(tmp_path, "sd15", "export.formats=[onnx]")
    find_spec = onnx_unet.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_unet.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r'needs .*onnxruntime.*pip install "stepdistill\[onnx\]"'):
        export_rung(config, 4)
    assert not (config.run_dir / "rungs" / "4" / "onnx").exists()


SESSION = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, *map(int, sys.argv[2:]))}
inputs = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
inputs["timestep"] = np.array([499, 499])
print(session.run(None, inputs)[0].shape)
"""


@pytest.mark.slow
def test_the_int8_unet_is_a_fourth_as_large_and_draws_nearly_the_same(trained_run, tmp_path):
    """From export to the table: rows by onnxruntime in float32 draw what the pipeline draws, in int8 nearly that."""
    pytest.importorskip("onnxruntime")
    options = ["export.formats=[diffusers,onnx]", "export.quantize=int8", "evaluation.onnx=[float32,int8]"]
    shutil.copytree(trained_run.output_dir, tmp_path / "runs")
    config = tiny_config(tmp_path / "runs", *options, "evaluation.teacher_steps=[8]")
    stages.export(config, steps=[4])
    folder = rung_folder(config.run_dir, 4)
    about = read_sealed(folder / "onnx-int8" / "int8.json")
    assert about["bytes"] < 0.27 * about["float32_bytes"]
    assert 0.001 < about["error"] < 0.08
    facts = teacher_facts(config)
    width, tokens = (
        facts.unet["cross_attention_dim"],
        facts.configs["text_encoder"]["max_position_embeddings"],
    )
    arguments = [str(folder / "onnx-int8" / "unet.onnx"), str(tokens), str(width)]
    completed = subprocess.run(
        [sys.executable, "-c", SESSION, *arguments], capture_output=True, text=True, check=False
    )
    assert completed.stdout.strip() == "(2, 4, 8, 8)", completed.stderr[-2000:]
    sampler = Sampler(config)
    by_torch, exact, rounded = (
        sampler.draw(Row("row", 4, 1.0, 4, onnx=onnx), config.preview.prompts, seed=0)[1]
        for onnx in (None, "float32", "int8")
    )
    assert torch.allclose(by_torch, exact, atol=1e-4)
    error = (rounded - by_torch).norm() / by_torch.norm()
    assert 1e-3 < error < 0.15
    again = sampler.draw(Row("row", 4, 1.0, 4), config.preview.prompts, seed=0)[1]
    assert torch.equal(again, by_torch)  # the pipeline has its own U-Net again


@pytest.mark.slow
def test_a_table_has_rows_by_onnxruntime(trained_run, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copytree(trained_run.output_dir, tmp_path / "runs")
    options = ["export.formats=[diffusers,onnx]", "export.quantize=int8", "evaluation.onnx=[int8]"]
    config = tiny_config(
        tmp_path / "runs", *options, "evaluation.teacher_steps=[8]", "evaluation.lora_scales=[]"
    )
    with pytest.raises(
        ConfigError, match=r"evaluation\.onnx: got int8, but there is no .*fix: `stepdistill export`"
    ):
        stages.evaluate(config)
    stages.export(config)
    stages.evaluate(config)
    rows = {row["row"]: row for row in read_sealed(config.run_dir / "evaluation" / "results.json")["rows"]}
    plain, rounded = rows["student-4"], rows["student-4-int8"]
    assert rounded["kind"] == "lora"
    assert rounded["latent_mse_to_teacher"] > 0
    assert rounded["fid_to_real"] == pytest.approx(plain["fid_to_real"], rel=0.2)
    assert rounded["cost"]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["export.quantize=int8"], "export.quantize: got int8 without onnx among export.formats"),
        (["evaluation.onnx=[float32]"], "evaluation.onnx: got float32, which export does not write"),
        (
            ["evaluation.onnx=[int8]", "export.formats=[onnx]"],
            r"evaluation.onnx: got int8, .*fix: export.formats=\[diffusers,onnx\] export.quantize=int8",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(tmp_path, options, message):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match=message):
        stages.run_all(tiny_config(tmp_path, *options))
    assert list(tmp_path.iterdir()) == []
