"""The LoRA merged into a copy of the base U-Net in float32, for programs that cannot load an adapter."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from stepdistill.disk.durable import read_json, whole_folder, write_json
from stepdistill.models.identity import layer_shapes
from stepdistill.models.lora_file import Lora, check_fits
from stepdistill.models.network.kind import load_network


def fused_unet(base: Path, lora: Lora) -> UNet2DConditionModel:
    """The base U-Net with W + delta W in every layer of the LoRA, float32; ValueError if the LoRA is of another U-Net.

    Args:
        base: folder of the base pipeline; its weights must not be quantised (teacher/folder.py refuses these).
        lora: a LoRA of that base.
    """
    unet = load_network(base)
    weights = dict(unet.named_parameters())
    check_fits(lora, layer_shapes(unet), name="the rung's file")
    for name, layer in lora.layers.items():
        weights[f"{name}.weight"].data += layer.delta()
    return unet


def write_fused(folder: Path, unet: UNet2DConditionModel, *, dtype: torch.dtype) -> Path:
    """Saves the merged U-Net, rounded once to dtype, as a folder for `UNet2DConditionModel.from_pretrained`; returns it.

    The base's path on this disk (`_name_or_path`) is removed from config.json.
    """
    with whole_folder(folder) as partial:
        unet.to(dtype).save_pretrained(partial, safe_serialization=True)
        written = partial / "config.json"
        config = read_json(written) or {}
        write_json(written, {key: value for key, value in config.items() if key != "_name_or_path"})
    return folder
