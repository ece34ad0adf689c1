"""A reader of kohya's LoRA files, written from their documentation only; it merges them into weights by name.

A layer is three tensors, lora_unet_<module, dots as underscores> and .lora_down.weight (r, in[, k, k]), .lora_up.weight
(out, r[, 1, 1]), .alpha; W' = W + alpha / r * up . down (sd-scripts, networks/lora.py's merge_to).
"""

import torch
from safetensors import safe_open


def merged(path, weights):
    """The weights with the file's LoRA merged, in float32; AssertionError for a tensor that fits no weight.

    Args:
        path: the file.
        weights: a U-Net's weights, by the names that the file's names are made from (input_blocks.1.0.in_layers.2.weight).
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    keys = {key.removesuffix(".weight").replace(".", "_"): key for key in weights if key.endswith(".weight")}
    assert len(keys) == sum(key.endswith(".weight") for key in weights), "two names are spelt alike"
    result = {key: weight.clone().float() for key, weight in weights.items()}
    names = {key.split(".")[0] for key in tensors}
    assert set(tensors) == {
        f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for name in names:
        assert name.startswith("lora_unet_")
        key = keys[name.removeprefix("lora_unet_")]
        down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
        alpha = tensors[f"{name}.alpha"]
        assert alpha.ndim == 0
        rank = down.shape[0]
        if down.ndim == 4:
            assert up.shape[1:] == (rank, 1, 1)
            update = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
        else:
            update = up @ down
        result[key] += float(alpha) / rank * update
    return result
