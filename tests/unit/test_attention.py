"""The attention kernel that torch chooses is named, and the slow one is warned of."""

import logging

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.models.attention import attention_kernels, head_widths, log_attention
from stepdistill.teacher.families import family_configs

CPU = torch.device("cpu")


def test_the_heads_of_the_released_networks():
    with torch.device("meta"):
        widths = {
            name: head_widths(UNet2DConditionModel.from_config(family_configs(name)["unet"]))
            for name in ("sd15", "sdxl")
        }
    assert widths == {"sd15": [40, 80, 160], "sdxl": [64]}


def test_the_named_kernel_is_the_one_that_runs():
    kernels = attention_kernels([40, 64], dtype=torch.bfloat16, device=CPU)
    assert kernels == {"FLASH_ATTENTION": [40, 64]}
    tokens = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16)
    with torch.profiler.profile() as profile:
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    assert any("flash_attention" in event.key for event in profile.key_averages())


def test_the_kernel_is_logged_and_the_slow_one_warned_of(tiny_unet, caplog):
    with caplog.at_level(logging.INFO):
        log_attention(tiny_unet, dtype=torch.float32, device=CPU)
    assert [record.message for record in caplog.records] == [
        "attention: flash for heads of width 16 in float32"
    ]
    caplog.clear()
    with sdpa_kernel(SDPBackend.MATH):
        log_attention(tiny_unet, dtype=torch.float32, device=CPU)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "fix: training.mixed_precision=bf16" in record.message
