"""Which kernel computes attention. torch chooses it by device, dtype and width of a head; here it is asked what it takes."""

import logging
from typing import Any

import torch
from torch.nn.attention import SDPBackend

logger = logging.getLogger(__name__)
_TOKENS = 1024  # the choice does not depend on it
_MATERIALISING = "MATH"


def head_widths(network: Any) -> list[int]:
    """The widths of the attention heads in a diffusers network, each once, in ascending order."""
    layers = (m for m in network.modules() if hasattr(m, "heads") and hasattr(m, "inner_dim"))
    return sorted({layer.inner_dim // layer.heads for layer in layers})


def attention_kernels(widths: list[int], *, dtype: torch.dtype, device: torch.device) -> dict[str, list[int]]:
    """The widths of heads by the kernel that torch chooses for them: one of the names of torch's SDPBackend, such as
    FLASH_ATTENTION, CUDNN_ATTENTION, EFFICIENT_ATTENTION or MATH."""
    found: dict[str, list[int]] = {}
    for width in widths:
        # with gradients, because some kernels have no backward pass
        tokens = torch.empty(1, 1, _TOKENS, width, dtype=dtype, device=device, requires_grad=True)
        name = SDPBackend(torch._fused_sdp_choice(tokens, tokens, tokens)).name
        found.setdefault(name, []).append(width)
    return found


def log_attention(network: Any, *, dtype: torch.dtype, device: torch.device) -> None:
    """Logs the kernels of a network, and warns of the one that writes the whole matrix of attention weights."""
    for name, widths in attention_kernels(head_widths(network), dtype=dtype, device=device).items():
        heads = f"heads of width {', '.join(map(str, widths))} in {str(dtype).removeprefix('torch.')}"
        if name == _MATERIALISING:
            logger.warning(
                "attention: for %s torch has no fused kernel on this device, and writes all attention weights to memory; "
                "fix: training.mixed_precision=bf16, or a newer torch or GPU",
                heads,
            )
        else:
            logger.info("attention: %s for %s", name.removesuffix("_ATTENTION").lower(), heads)
