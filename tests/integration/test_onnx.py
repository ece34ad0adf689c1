"""The ONNX U-Net: onnxruntime's output equals torch's, also at other batch sizes than the traced one. Needs extra "onnx"."""

from pathlib import Path

import pytest
import torch

from stepdistill.config import ConfigError
from stepdistill.export import onnx_unet
from stepdistill.export.fused import fused_unet
from stepdistill.export.rung import export_rung
from stepdistill.models.lora_file import read_lora
from tests.integration.exported import rung_of


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21_v", "sdxl"])
def test_onnxruntime_computes_what_torch_does(tmp_path, family):
    pytest.importorskip("onnxruntime")
    config, teacher, _ = rung_of(tmp_path, family, "export.formats=[onnx]")
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
