"""Exports the U-Net with the LoRA merged to ONNX and compares onnxruntime's output with torch's. Needs the extra "onnx"."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import ConfigError
from stepdistill.disk.durable import whole_folder

FILE = "unet.onnx"
TOLERANCE = 1e-4
"""Largest allowed difference from torch's output, relative to the output's largest value."""


class _Named(torch.nn.Module):
    """The U-Net with plain tensors in and out: sample, timestep, encoder_hidden_states[, text_embeds, time_ids]."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The U-Net's prediction, (B, C, H, W)."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[
            0
        ]


def check_installed() -> None:
    """ConfigError if a package of the extra "onnx" is missing."""
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        raise ConfigError(
            f'export.formats: got onnx, which needs {", ".join(missing)}; fix: pip install "stepdistill[onnx]"'
        )


def inputs_of(
    unet: UNet2DConditionModel, batch: int, *, tokens: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of the U-Net's shapes, by their names in the ONNX file."""
    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {
        "sample": noise(batch, config.in_channels, height, width),
        "timestep": torch.full((batch,), 499, dtype=torch.int64),
        "encoder_hidden_states": noise(batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": noise(batch, pooled), "time_ids": 100 * noise(batch, 6).abs()}
    return inputs


@torch.no_grad()
def write_onnx(folder: Path, unet: UNet2DConditionModel, *, tokens: int) -> float:
    """Writes unet.onnx with dynamic batch, height and width, and compares it with torch at a size other than the traced one.

    Weights of more than 1 GiB are written to a file beside it.

    Args:
        folder: folder for the file.
        unet: the merged U-Net; computed in float32.
        tokens: sequence length of the text encoder.
    Returns: the largest difference from torch's output, relative to the output's largest value. ValueError if it is above
    TOLERANCE.
    """
    module = _Named(unet.float()).eval()
    factor = 2 ** (len(unet.config.block_out_channels) - 1)  # every level but the last halves the sides
    inputs = inputs_of(unet, 2, tokens=tokens)
    if (
        min(inputs["sample"].shape[2:]) < 2 * factor
    ):  # the exporter would take a side of length 1 for a constant
        inputs["sample"] = torch.randn(2, unet.config.in_channels, 2 * factor, 2 * factor)
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (factor * torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    free: tuple[Any, ...] = tuple(
        {0: batch, 2: height, 3: width} if name == "sample" else {0: batch} for name in inputs
    )
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=free,
        verbose=False,
        output_names=["out_sample"],
    )
    assert program is not None  # torch.onnx.export returns the program if no file is given
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # stack traces hold local paths
    other = inputs_of(unet, 3, tokens=tokens, seed=1)
    other["sample"] = torch.randn(3, unet.config.in_channels, 2 * factor, 3 * factor)
    with whole_folder(folder) as partial:
        program.save(str(partial / FILE), external_data=sum(p.nbytes for p in unet.parameters()) > 2**30)
        error = difference(partial / FILE, module, other)
        if not error <= TOLERANCE:
            raise ValueError(
                f"{folder}: onnxruntime's output differs from torch's by {error:.1e} (relative); allowed: {TOLERANCE:g}"
            )
    return error


@torch.no_grad()
def difference(path: Path, module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference between onnxruntime's and torch's outputs, relative to the output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    expected = module(*inputs.values())
    return float((torch.from_numpy(output) - expected).abs().max() / expected.abs().max())
