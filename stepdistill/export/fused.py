"""The LoRA merged into a copy of the base, once, in float32: a U-Net of its own for where no adapter can be loaded."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from stepdistill.disk.durable import read_json, whole_folder, write_json
from stepdistill.models.identity import layer_shapes
from stepdistill.models.lora_file import Lora, check_fits
from stepdistill.models.network.kind import load_network


def fused_unet(base: Path, lora: Lora) -> UNet2DConditionModel:
    """W + delta W in float32 for every layer; ValueError where the LoRA is another U-Net's.

    Args:
        base: the pipeline's folder, whose weights are no quantised ones (teacher/folder.py refuses these).
        lora: of that base.
    """
    unet = load_network(base)
    weights = dict(unet.named_parameters())
    check_fits(lora, layer_shapes(unet), name="the rung's file")
    for name, layer in lora.layers.items():
        weights[f"{name}.weight"].data += layer.delta()
    return unet


def write_fused(folder: Path, unet: UNet2DConditionModel, *, dtype: torch.dtype) -> Path:
    """Saves the merged U-Net as a folder that `UNet2DConditionModel.from_pretrained` reads, rounded once, without the place
    on this disk that its base came from."""
    with whole_folder(folder) as partial:
        unet.to(dtype).save_pretrained(partial, safe_serialization=True)
        written = partial / "config.json"
        named = read_json(written) or {}
        write_json(written, {key: value for key, value in named.items() if key != "_name_or_path"})
    return folder
