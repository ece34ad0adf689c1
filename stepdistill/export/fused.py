"""The LoRA merged into a copy of the base, once, in float32: a U-Net of its own for where no adapter can be loaded."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import ConfigError
from stepdistill.durable import read_json, writing
from stepdistill.models.loading import load_unet
from stepdistill.models.lora_file import Lora, check_fits


def fused_unet(base: Path, lora: Lora) -> UNet2DConditionModel:
    """W + delta W in float32 for every layer; ConfigError where the base's weights are quantised.

    Args:
        base: the pipeline's folder.
        lora: of that base.
    """
    if "quantization_config" in (read_json(base / "unet" / "config.json") or {}):
        raise ConfigError(
            f"export.formats: got fused, but the U-Net in {base} is quantised, and sums would be rounded; "
            f"allowed: a base in float32, float16 or bfloat16, or the formats diffusers, kohya"
        )
    unet = load_unet(base)
    weights = dict(unet.named_parameters())
    check_fits(lora, {k: tuple(w.shape) for k, w in weights.items()}, name="the rung's file")
    for name, layer in lora.layers.items():
        weights[f"{name}.weight"].data += layer.delta()
    return unet


def write_fused(folder: Path, unet: UNet2DConditionModel, *, dtype: torch.dtype) -> Path:
    """Saves the merged U-Net as a folder that `UNet2DConditionModel.from_pretrained` reads, rounded once."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(folder):
            unet.to(dtype).save_pretrained(partial, safe_serialization=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
