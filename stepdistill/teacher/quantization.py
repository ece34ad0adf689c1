"""The base model's linear layers in 8 or 4 bits, through torchao: the form of each kind, and the bytes that it takes.

int8, fp8   W ~ s_i q_ij        one scale s per row, in the weights' dtype
nf4         W ~ s_b NF4[q_k]    one scale s per block b of 64 weights, itself in 8 bits; NF4 holds 16 quantiles of a
                                normal distribution (QLoRA, arXiv 2305.14314, section 3)
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from stepdistill.config.sections import Quantization

NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA; and scales that share a second one. QLoRA's 256 of these do not divide SDXL's
320-wide layers."""
_NF4_CONSTANTS = 17
"""Numbers that each layer's matrix keeps beside: the 16 quantiles and the mean of its scales."""


def quantization_config(kind: Quantization) -> Any:
    """torchao's config of a kind other than "none"."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    if kind == "nf4":
        return _nf4_config()
    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """A quantised weight as an ordinary tensor; torchao's class of NF4 has its own name for it."""
    original: Callable[[], torch.Tensor] = getattr(weight, "get_original_weight", weight.dequantize)
    return original()


def quantized_bytes(layer: nn.Linear, kind: Quantization) -> int:
    """Bytes of a linear layer's weight when stored in a kind."""
    count, itemsize = layer.weight.numel(), layer.weight.itemsize
    if kind == "none" or (kind == "nf4" and not _fits_nf4(layer)):
        return count * itemsize
    if kind == "nf4":
        scales = count // NF4_BLOCK
        return count // 2 + scales + (scales // NF4_BLOCK + _NF4_CONSTANTS) * itemsize
    return count + layer.out_features * itemsize


def _fits_nf4(layer: nn.Linear) -> bool:
    """Whether the weights divide into blocks and the scales too; another layer keeps its dtype."""
    return layer.weight.numel() % NF4_BLOCK**2 == 0


@cache
def _nf4_config() -> Any:
    """A config of torchao's kind; torchao's own quantises by blocks that not every layer has."""
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import to_nf4
    from torchao.quantization.transform_module import register_quantize_module_handler

    class Nf4Config(AOBaseConfig):
        """NF4 for every linear layer whose size allows it."""

    @register_quantize_module_handler(Nf4Config)
    def quantize(layer: nn.Linear, config: Nf4Config) -> nn.Linear:
        if _fits_nf4(layer):
            weight = to_nf4(layer.weight.detach(), NF4_BLOCK, NF4_BLOCK)
            layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    return Nf4Config()
