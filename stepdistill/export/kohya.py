"""The LoRA in the format of kohya's tools, ComfyUI, A1111 and Forge: one file with .alpha tensors and a header of strings.

Names: lora_unet_ and the module's path with underscores. kohya uses diffusers' module names for SD, and the names of the
original repository for SDXL (sgm: input_blocks, middle_block, output_blocks). For SDXL, ComfyUI and diffusers read both
spellings; with diffusers' spelling A1111 loses a layer, and kohya's own tools lose all layers.
A layer's update is alpha / r * lora_up @ lora_down; alpha = r * scale expresses any scaling of peft's config.
"""

import contextlib
import filecmp
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from stepdistill.disk.durable import canonical_safetensors, writing
from stepdistill.disk.guarded_folder import make_folder
from stepdistill.models.lora_file import Lora, LoraLayer
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.lora_header import check_lora_header

HASH = "sshs_model_hash"
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sd2_v": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sd2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}


_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # ModelSpec has no name for x0 prediction


def family_of(teacher: TeacherFacts) -> str:
    """The model family, "sd1", "sd2", "sd2_v" or "sdxl", from added conditions, linear projections and prediction type."""
    if teacher.unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    if not teacher.unet.get("use_linear_projection"):
        return "sd1"
    return "sd2_v" if teacher.prediction_type == "v_prediction" else "sd2"


def sgm_name(module: str, unet_config: Mapping[str, Any]) -> str:
    """The name in the original repository, such as input_blocks.4.1.proj_in, of a module of diffusers' U-Net.

    With n_b layers in down block b, and n_b + 1 in the up block at its level, layer k of a block is number
    k + sum over the earlier blocks of (n + 1), to which the down path adds 1. Within it the residual block has index 0 and
    the attention index 1; the resampler is the last layer of its block.
    """
    kind, rest = module.split(".", 1)
    if kind == "mid_block":
        part, number, inner = rest.split(".", 2)
        place = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(part, inner)}"
    block, part, number, inner = rest.split(".", 3)
    count = unet_config.get("layers_per_block", 2)
    levels = [int(count)] * len(unet_config["up_block_types"]) if isinstance(count, int) else list(count)
    if kind == "up_blocks":
        levels.reverse()
    layers, first = levels[int(block)], sum(n + 1 for n in levels[: int(block)])
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if part == "upsamplers":
        attended = "CrossAttn" in unet_config["up_block_types"][int(block)]
        return f"output_blocks.{first + layers}.{2 if attended else 1}.conv"
    place = 1 if part == "attentions" else 0
    side, offset = ("input_blocks", 1) if kind == "down_blocks" else ("output_blocks", 0)
    return f"{side}.{first + int(number) + offset}.{place}.{_inner(part, inner)}"


def _inner(part: str, inner: str) -> str:
    return _RESNET[inner] if part == "resnets" else inner


def kohya_state(
    lora: Lora, unet_config: Mapping[str, Any], *, sgm: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The LoRA's tensors under kohya's names: lora_unet_NAME.lora_down.weight, .lora_up.weight, .alpha (float32 scalar)."""
    state = {}
    for module, layer in lora.layers.items():
        name = sgm_name(module, unet_config) if sgm else module
        prefix = _flat(name)
        state[f"{prefix}.lora_down.weight"] = _stored(layer.down, dtype, module)
        state[f"{prefix}.lora_up.weight"] = _stored(layer.up, dtype, module)
        state[f"{prefix}.alpha"] = torch.tensor(layer.scale * layer.rank)
    return state


def read_kohya(path: Path, modules: Iterable[str], unet_config: Mapping[str, Any]) -> Lora:
    """Reads a kohya file with either spelling, its layers under diffusers' module names; ValueError for an unknown layer.

    Args:
        path: the file.
        modules: module names of the U-Net onto which the LoRA is to be loaded.
        unet_config: config of that U-Net.
    """
    diffusers_names = {}
    for module in modules:
        if module.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
            diffusers_names[_flat(module)] = module
            with contextlib.suppress(KeyError):  # norms, which have no LoRA
                diffusers_names[_flat(sgm_name(module, unet_config))] = module
    check_lora_header(path)
    state = load_file(path)
    layers = {}
    for name in sorted({key.partition(".")[0] for key in state}):
        if name not in diffusers_names:
            raise ValueError(f"{path} is a LoRA of another network: this one has no layer {name}")
        parts = [state.get(f"{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")]
        down, up, alpha = parts
        if (
            down is None
            or up is None
            or alpha is None
            or 0 in down.shape
            or down.ndim < 2
            or alpha.numel() != 1
        ):
            raise ValueError(
                f"{path} holds only a part of {name}: the file is incomplete; fix: export it again"
            )
        layers[diffusers_names[name]] = LoraLayer(down, up, float(alpha) / down.shape[0])
    return Lora(layers, {})


def _flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def _stored(tensor: torch.Tensor, dtype: torch.dtype, module: str) -> torch.Tensor:
    converted = tensor.to(dtype).contiguous()
    if not bool(converted.isfinite().all()):
        raise ValueError(f"{module} does not fit into {dtype}; allowed: export.dtype=float32 or bfloat16")
    return converted


def kohya_header(
    lora: Lora,
    family: str,
    *,
    title: str,
    base_name: str,
    resolution: tuple[int, int],
    prediction_type: str,
) -> dict[str, str]:
    """The header entries that the tools read: ss_* of kohya's scripts and modelspec.* of Stability's ModelSpec 1.0.1.

    It contains no date, so that equal weights give equal bytes.
    """
    alphas = {layer.scale * layer.rank for layer in lora.layers.values()}
    alpha = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    ranks = {layer.rank for layer in lora.layers.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    size = f"{resolution[1]}x{resolution[0]}"
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}, allow_nan=False),
        "ss_base_model_version": _VERSIONS[family],
        "ss_v2": str(family.startswith("sd2")),
        "ss_sd_model_name": Path(base_name).name,
        "ss_output_name": title,
        "ss_resolution": f"({resolution[1]}, {resolution[0]})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES[family],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": size,
    }
    if prediction_type in _PREDICTIONS:
        header["modelspec.prediction_type"] = _PREDICTIONS[prediction_type]
    return header


def write_kohya(path: Path, state: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> Path:
    """Writes the file atomically and returns its path. Equal tensors and header give equal bytes, and a file that already
    has these bytes is left alone. The header entry sshs_model_hash is `tensors_hash` of the tensors."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        make_folder(path.parent)
        try:
            save_file(dict(state), partial, metadata={**header, HASH: tensors_hash(state)})
            canonical_safetensors(partial)
            if not (path.is_file() and filecmp.cmp(path, partial, shallow=False)):
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def tensors_hash(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a safetensors file's content without its header. kohya's tools and A1111 identify a LoRA by it; it does not
    change with the title."""
    content = save(dict(state))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def hash_of_file(path: Path) -> str:
    """tensors_hash of a file on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), 1)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def kohya_name(name: str, steps: int, rank: int | None = None) -> str:
    """The file's name: <name>_<N>step_lora.safetensors, or <name>_<N>step_rank<R>_lora.safetensors for a lower rank."""
    lower = "" if rank is None else f"_rank{rank}"
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}_{steps}step{lower}_lora.safetensors"
