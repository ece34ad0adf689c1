"""A network's LoRA on disk: writes it, reads its layers with their scales, and checks whether it can be used.

delta W = scale * up @ down (LoRA, arXiv 2106.09685, section 4.1): up is peft's lora_B (out, r), down its lora_A (r, in);
scale = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732). A file without metadata counts as alpha = r,
as in diffusers.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from stepdistill.disk.durable import canonical_safetensors, writing
from stepdistill.run.rungs import WEIGHT_NAME
from stepdistill.teacher.lora_header import check_lora_header

_SAVERS: dict[str, Any] = {"unet": StableDiffusionPipeline, "transformer": StableDiffusion3Pipeline}
"""A pipeline that saves LoRAs of each part; a tensor's name begins with the part."""
USAGE_HINT = {
    "usage_hint": "diffusers' format: pipeline.load_lora_weights reads all of it. ComfyUI, A1111 and Forge take a part "
    "of it and leave out the rest without an error; of a rung, `stepdistill export` writes the file for them into kohya/."
}
"""Metadata in the header of every file that write_lora writes."""


@dataclass(frozen=True)
class LoraLayer:
    """One module's update. down: (r, in) or (r, in, k, k); up: (out, r) or (out, r, 1, 1)."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r of this layer."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer updates."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> torch.Tensor:
        """The update that is added to the weight, in float32."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        return (self.scale * up @ down).reshape(self.weight_shape)


@dataclass(frozen=True)
class Lora:
    """A whole LoRA: layers by the name of their module in the network; peft's config, empty if the file has none; and the
    part of the pipeline that is its network."""

    layers: dict[str, LoraLayer]
    config: dict[str, Any]
    part: str = "unet"

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(layer.rank for layer in self.layers.values())

    def plain(self, layers: Mapping[str, LoraLayer]) -> "Lora":
        """A LoRA of these layers, all of one rank and with scale 1, and this LoRA's config changed to say so."""
        rank = next(iter(layers.values())).rank
        plain = {"r": rank, "lora_alpha": rank, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
        return replace(self, layers=dict(layers), config={**self.config, **plain})

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors under peft's keys."""
        return {
            f"{name}.lora_{side}.weight": tensor.contiguous()
            for name, layer in self.layers.items()
            for side, tensor in (("A", layer.down), ("B", layer.up))
        }


def weighted_sum(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """A LoRA whose update of each layer is the weighted sum of theirs, exactly: its rank is the sum of their ranks."""
    names = dict.fromkeys(name for lora in loras for name in lora.layers)
    layers = {}
    for name in names:
        parts = [
            (weight * lora.layers[name].scale, lora.layers[name])
            for lora, weight in zip(loras, weights, strict=True)
            if name in lora.layers
        ]
        up = torch.cat([factor * layer.up.double() for factor, layer in parts], dim=1)
        layers[name] = LoraLayer(torch.cat([layer.down.double() for _, layer in parts]), up, scale=1.0)
    return Lora(layers, loras[0].config, loras[0].part)


def write_lora(
    folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, part: str = "unet"
) -> Path:
    """Writes pytorch_lora_weights.safetensors in one step, under peft's keys, all of which diffusers loads.

    Equal weights give equal bytes. The config contains rank and alpha, which diffusers would otherwise guess.
    part: of the pipeline, that the LoRA belongs to.
    """
    path, partial = folder / WEIGHT_NAME, folder / f".{WEIGHT_NAME}.partial"
    with writing(path):
        try:
            saved = {f"{part}_lora_layers": dict(state), f"{part}_lora_adapter_metadata": dict(config)}
            _SAVERS[part].save_lora_weights(folder, **saved, weight_name=partial.name)
            canonical_safetensors(partial, metadata=USAGE_HINT)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return path


def lora_path(path: Path) -> Path:
    """The LoRA file at a path: the file itself, or the only one in a folder; ValueError if that has none or several."""
    if path.is_file():
        return path
    files = sorted(p for p in path.glob("*.safetensors") if p.is_file())
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ValueError(
            f"{path} holds {len(files)} LoRA files ({names}); allowed: one file, or a folder with one"
        )
    return files[0]


def read_lora(path: Path) -> Lora:
    """Reads a LoRA from a file with peft's keys, or from a folder that holds one such file.

    ValueError if it cannot be used as it is: no LoRA of one network, a DoRA, half of a pair missing, numbers that are not
    finite, or nothing but zeros.
    """
    path = lora_path(path)
    entries = check_lora_header(path)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    part = next((name for name in _SAVERS if any(key.startswith(f"{name}.") for key in state)), "unet")
    prefix = f"{part}."
    config = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    if config.get("use_dora") or any("lora_magnitude_vector" in key or "dora_scale" in key for key in state):
        raise ValueError(
            f"{path} is a DoRA, whose update is not a product of two matrices; allowed: LoRA, rsLoRA"
        )
    layers = _layers(path, state, config, part)
    if not all(bool(t.isfinite().all()) for t in state.values()):
        raise ValueError(
            f"{path} holds numbers that are not finite: the file is damaged, or its training diverged"
        )
    if not any(bool(layer.up.any()) and bool(layer.down.any()) for layer in layers.values()):
        raise ValueError(f"{path} changes nothing: all its updates are zero")
    return Lora(layers, config, part)


def _layers(
    path: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any], part: str
) -> dict[str, LoraLayer]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    foreign = []
    for key, tensor in state.items():
        match = re.fullmatch(rf"(?:{part}\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None or key.startswith("text_encoder"):
            foreign.append(key)
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor
    if foreign:
        raise ValueError(
            f"{path} holds {len(foreign)} tensors that are not a LoRA of diffusers on one network, first {foreign[0]}; "
            f"allowed: keys NAME.lora_A.weight and NAME.lora_B.weight"
        )
    halves = [name for name, pair in pairs.items() if len(pair) != 2]
    if halves or not pairs:
        what = f"half of {halves[0]}" if halves else "no layer"
        raise ValueError(f"{path} holds {what}: the file is incomplete")
    layers = {}
    for name, pair in sorted(pairs.items()):
        down, up = pair["A"], pair["B"]
        fits = up.ndim == down.ndim and up.ndim in (2, 4) and up.shape[1] == down.shape[0]
        if not fits or 0 in (*up.shape, *down.shape):
            raise ValueError(
                f"{path}: {name} has lora_B {tuple(up.shape)} and lora_A {tuple(down.shape)}, which is not a LoRA"
            )
        layers[name] = LoraLayer(down, up, _scale(name, down.shape[0], config))
    return layers


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r or alpha / sqrt(r), with alpha found as peft does: a key of alpha_pattern matches the end of a name."""
    alpha = config.get("lora_alpha", rank)  # check_lora_header has checked that patterns are names of modules
    for pattern, pattern_alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = pattern_alpha
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_fits(lora: Lora, shapes: Mapping[str, tuple[int, ...]], *, name: str) -> None:
    """ValueError if the U-Net lacks a module of some layer's name and shape: the LoRA is of another U-Net.

    Args:
        lora: the LoRA to be loaded.
        shapes: shapes of the U-Net's layers by module name (identity.layer_shapes).
        name: how the message names the LoRA.
    """
    odd = [key for key, layer in lora.layers.items() if shapes.get(key) != layer.weight_shape]
    if odd:
        shape_here = shapes.get(odd[0])
        differs = f"is {shape_here} in this one" if shape_here else "this one does not have"
        raise ValueError(
            f"{name} is a LoRA of another network: {len(odd)} of its {len(lora.layers)} layers do not fit, first {odd[0]} "
            f"{lora.layers[odd[0]].weight_shape}, which {differs}"
        )
