"""A U-Net that onnxruntime computes, in the place of a pipeline's own: for exports to ONNX, in float32 or in 8 bits."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel


class OnnxUNet(torch.nn.Module):
    """Answers a diffusers pipeline as the U-Net that the file was exported from, on the CPU, in float32.

    file: unet.onnx of a rung's onnx/ or onnx-int8/ folder.
    unet: the pipeline's U-Net, whose config says what the pipeline must give; its weights are not used.
    """

    def __init__(self, file: Path, unet: UNet2DConditionModel) -> None:
        super().__init__()
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]
        self.config, self.dtype, self.device = unet.config, torch.float32, torch.device("cpu")
        self.add_embedding = getattr(unet, "add_embedding", None)  # SDXL's pipeline asks for its width

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        **_options: Any,
    ) -> tuple[torch.Tensor]:
        """The output (B, C, H, W) in a tuple, as with return_dict=False."""
        timesteps = torch.as_tensor(timestep).to(torch.int64).expand(len(sample))
        inputs = {"sample": sample, "timestep": timesteps, "encoder_hidden_states": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        arrays = {
            name: inputs[name]
            .to("cpu", torch.int64 if name == "timestep" else torch.float32)
            .contiguous()
            .numpy()
            for name in self._names
        }
        return (torch.from_numpy(self._session.run(None, arrays)[0]).to(sample.device, sample.dtype),)


def load_onnx(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Replaces a pipeline's U-Net by the one in a rung's onnx/ or onnx-int8/ folder, which has the rung's LoRA in it."""
    pipeline.unet = OnnxUNet(folder / "unet.onnx", pipeline.unet)
