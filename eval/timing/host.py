"""What Python takes: SDXL's module tree with few channels, whose arithmetic takes nearly nothing."""

import torch
from diffusers import UNet2DConditionModel
from random_teacher import unet_config

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork

from .clock import median_seconds

_FEW_CHANNELS = {
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 16,
    "sample_size": 8,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def host(count: int) -> dict[str, float]:
    """`_host` on one core: more threads take longer to meet than the small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _host(count)
    finally:
        torch.set_num_threads(threads)


def _host(count: int) -> dict[str, float]:
    """Milliseconds of a role switch, of forward passes, and of a student's forward and backward pass with and without
    recomputation."""
    unet = UNet2DConditionModel(**(unet_config("sdxl") | _FEW_CHANNELS)).eval().requires_grad_(False)
    network = SharedNetwork.with_student_and_teacher(unet, rank=4, seed=0, gradient_checkpointing=True)
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.zeros(1, 6)}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), Conditioning(torch.randn(1, 8, 16), added))

    def forward(adapter: str | None) -> None:
        with torch.no_grad(), network.using(adapter):
            network.ask(*inputs)

    def update_pass() -> None:
        with network.using(STUDENT):
            network.ask(*inputs).square().mean().backward()

    def switches() -> None:
        for _ in range(1000):
            with network.using(TEACHER):
                pass

    found: dict[str, float] = {
        "modules": sum(1 for _ in unet.modules()),
        "switch_ms": round(median_seconds(switches, 3), 5),  # of 1000 in seconds, so of one in milliseconds
        "base_forward_ms": round(1000 * median_seconds(lambda: forward(None), count), 1),
        "lora_forward_ms": round(1000 * median_seconds(lambda: forward(STUDENT), count), 1),
        "recomputed_pass_ms": round(1000 * median_seconds(update_pass, count), 1),
    }
    unet.disable_gradient_checkpointing()
    return found | {"pass_ms": round(1000 * median_seconds(update_pass, count), 1)}
