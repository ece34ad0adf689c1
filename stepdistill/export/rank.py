"""Low-rank approximation by singular values: a rung's LoRA at a lower rank, and a LoRA from a fully fine-tuned U-Net.

The best rank-R approximation in Frobenius norm keeps the R largest singular values (Eckart, Young 1936); the energy kept is
the sum of their squares divided by the sum of all squares. Every layer gets the same rank, padded with zeros if its matrix
has a lower rank, so that the files of all rungs fit one compiled network.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import ConfigError
from stepdistill.models.adapters import as_plain_data
from stepdistill.models.lora_file import Lora, LoraLayer, write_lora
from stepdistill.models.lora_layers import lora_config
from stepdistill.models.network.unet import LORA_TARGETS
from stepdistill.teacher.examine import not_finite
from stepdistill.teacher.files import check_counts, read_headers, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, weights_variant
from stepdistill.teacher.loading import loading

_Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (out, m), S (m,), V^T (m, in k k), float64


@dataclass(frozen=True)
class Reduced:
    """A LoRA of lower rank, and the shares of the energy that it keeps, 0 to 1."""

    lora: Lora
    energy_by_module: dict[str, float]
    """Share kept in each module."""
    energy_kept: float
    """Share kept of the whole change, including weights that have no LoRA: first and last convolution, norms, biases."""
    left_out: float = 0.0
    """Share of the whole change that lies in weights without a LoRA."""


def reduce_rank(lora: Lora, rank: int) -> Reduced:
    """The LoRA with every layer's update reduced to `rank`; ValueError if the LoRA's rank is not higher."""
    if rank >= lora.rank:
        raise ValueError(f"export.rank: got {rank}; allowed: below {lora.rank}, the LoRA's rank")
    return cut_product(lora, rank)


def cut_product(lora: Lora, rank: int) -> Reduced:
    """A LoRA whose layers approximate this one's, of any rank, at `rank`."""
    factors = ((name, _svd_of_product(layer), layer.weight_shape) for name, layer in lora.layers.items())
    reduced = _cut(factors, rank, lora.config)
    return dataclasses.replace(reduced, lora=dataclasses.replace(reduced.lora, part=lora.part))


def extract_lora(
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    modules: Iterable[str],
    rank: int,
    config: Mapping[str, Any],
) -> Reduced:
    """A LoRA that approximates the difference between two U-Nets' weights.

    Args:
        base, tuned: weights by name, (out, in) or (out, in, k, k).
        modules: the layers that get a LoRA; changes of other weights are left out.
        rank: rank of every layer.
        config: peft's config of a LoRA on these modules.
    """
    layers = list(modules)
    factors = (
        (name, _svd_of_matrix(delta.flatten(1)), tuple(delta.shape))
        for name, delta in ((name, _difference(base, tuned, f"{name}.weight")) for name in layers)
    )
    others = base.keys() - {f"{name}.weight" for name in layers}
    lost = sum(float(_difference(base, tuned, name).square().sum()) for name in others)
    return _cut(factors, rank, config, lost=lost)


def _difference(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], name: str
) -> torch.Tensor:
    return tuned[name].double() - base[name].double()


def _svd_of_matrix(delta: torch.Tensor) -> _Factors:
    """SVD of a matrix (out, in) from the eigenvectors of the smaller Gram matrix: much faster if one side is long."""
    if delta.shape[0] > delta.shape[1]:
        u, s, vh = _svd_of_matrix(delta.T)
        return vh.T, s, u.T
    squares, u = torch.linalg.eigh(delta @ delta.T)
    u, s = u.flip(1), squares.flip(0).clamp(min=0).sqrt()
    return u, s, (u.T @ delta) / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]


def extract_to(folder: Path, base: Path, tuned: Path, rank: int) -> Reduced:
    """Writes `extract`'s LoRA as pytorch_lora_weights.safetensors into a folder, for the layers that LORA_TARGETS names.

    Args:
        folder: the folder to write.
        base, tuned: folders of a pipeline, or of a U-Net.
        rank: rank of every layer.
    ConfigError if the two U-Nets differ in shape, one is damaged, the rank is too high, or no adapted layer differs.
    """
    before, after = _unet(base), _unet(tuned)
    first, second = dict(before.named_parameters()), dict(after.named_parameters())
    if {k: w.shape for k, w in first.items()} != {k: w.shape for k, w in second.items()}:
        raise ConfigError(
            f"extract: {tuned} is a U-Net of another shape than {base}; allowed: a U-Net fine-tuned from it"
        )
    modules = _targets(before)
    most = max(min(shape[0], math.prod(shape[1:])) for shape in (first[f"{m}.weight"].shape for m in modules))
    if rank > most:
        raise ConfigError(
            f"--rank: got {rank}; allowed: up to {most}, the rank of this U-Net's largest layer"
        )
    reduced = extract_lora(
        first, second, modules, rank, as_plain_data(lora_config(rank, targets=list(LORA_TARGETS)))
    )
    if not any(bool(layer.up.any()) for layer in reduced.lora.layers.values()):
        raise ConfigError(
            f"extract: {tuned} equals {base} in every layer that a LoRA may change; nothing to extract"
        )
    write_lora(folder, reduced.lora.state(), reduced.lora.config)
    return reduced


def _unet(path: Path) -> UNet2DConditionModel:
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"extract: {path} holds no U-Net; allowed: a pipeline's folder, or its unet/")
    variant = weights_variant(folder.parent, folder.name)
    with loading("extract", folder, fix="another copy of the model"):
        files = weight_files(folder, WEIGHTS["unet"], variant)
        check_counts(folder / "config.json", read_object(folder / "config.json"), read_headers(files))
        damaged = not_finite(files)
        if damaged is not None:
            raise ValueError(f"{damaged} holds numbers that are not finite")
        unet, loaded = UNet2DConditionModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True
        )
        if loaded["missing_keys"]:
            raise ValueError(
                f"it lacks {len(loaded['missing_keys'])} weights, first {min(loaded['missing_keys'])}"
            )
    return unet.requires_grad_(False)


def _targets(unet: torch.nn.Module) -> list[str]:
    """Names of the linear and convolution layers that LORA_TARGETS names."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    ends = tuple(f".{end}" for end in LORA_TARGETS)
    return [name for name, m in unet.named_modules() if isinstance(m, kinds) and name.endswith(ends)]


def _svd_of_product(layer: LoraLayer) -> _Factors:
    """SVD of scale * up @ down without forming the product: QR of both factors, then the SVD of an r x r matrix."""
    left, first = torch.linalg.qr(layer.scale * layer.up.double().flatten(1))
    right, second = torch.linalg.qr(layer.down.double().flatten(1).T)
    u, s, vh = torch.linalg.svd(first @ second.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def _cut(
    factors: Iterable[tuple[str, _Factors, tuple[int, ...]]],
    rank: int,
    config: Mapping[str, Any],
    *,
    lost: float = 0.0,
) -> Reduced:
    layers, by_module, part, whole = {}, {}, 0.0, lost
    for name, (u, s, vh), shape in factors:
        root = s[:rank].sqrt()
        up, down = torch.zeros(shape[0], rank), torch.zeros(rank, vh.shape[1])
        up[:, : len(root)] = (u[:, :rank] * root).float()
        down[: len(root)] = (root[:, None] * vh[:rank]).float()
        places = [1] * (len(shape) - 2)
        layers[name] = LoraLayer(
            down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *places), scale=1.0
        )
        kept_energy, full_energy = float(s[:rank].square().sum()), float(s.square().sum())
        by_module[name] = kept_energy / full_energy if full_energy else 1.0
        part, whole = part + kept_energy, whole + full_energy
    energy = part / whole if whole else 1.0
    return Reduced(Lora({}, dict(config)).plain(layers), by_module, energy, lost / whole if whole else 0.0)
