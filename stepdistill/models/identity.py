"""Which base a LoRA belongs to, told from a U-Net in memory: how many tensors it has, and a few of its weights by name.

A hash of files is another for every way of saving them; these survive half precision, sharding and renaming, and differ
where a base was trained further by more than half precision rounds.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_COUNT = 32
_TOLERANCE = 0.02
"""Relative: bfloat16 rounds to 0.4 %."""
_MOST_OFF = 0.25
"""Share of the numbers that may be off: fine-tunes move nearly all of them."""


@dataclass(frozen=True)
class BaseIdentity:
    """tensors: how many the U-Net has; weights: the middle number of some matrices, by name."""

    tensors: int
    weights: dict[str, float]

    @classmethod
    def of_json(cls, raw: Any) -> "BaseIdentity | None":
        """What `as_json` gave, None for anything else."""
        tensors, weights = (raw.get("tensors"), raw.get("weights")) if isinstance(raw, dict) else (None, None)
        if type(tensors) is not int or not isinstance(weights, dict):
            return None
        if not all(isinstance(number, int | float) for number in weights.values()):
            return None
        return cls(tensors, weights)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def same_weights(self, other: "BaseIdentity") -> bool | None:
        """Whether the numbers are of one base; None where the two share none, as with a quantised one."""
        both = [
            (self.weights[name], other.weights[name]) for name in self.weights.keys() & other.weights.keys()
        ]
        off = sum(abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in both)
        return off <= _MOST_OFF * len(both) if both else None


def identity_of_folder(folder: Path) -> BaseIdentity:
    """Of the U-Net's weight files in a pipeline's folder; they are not read as a whole."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted((folder / "unet").glob("*.safetensors"))
        ]
        place = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        matrices = [key for key, file in place.items() if len(file.get_slice(key).get_shape()) > 1]
        return BaseIdentity(len(place), _some(matrices, lambda key: place[key].get_tensor(key)))


def identity_of(unet: torch.nn.Module) -> BaseIdentity:
    """Of a U-Net in memory, whatever adapters are on it, compiled or not; without numbers of what is quantised."""
    parameters = {
        _plain_name(key): parameter for key, parameter in unet.named_parameters() if ".lora_" not in key
    }
    return BaseIdentity(
        len(parameters), _some([k for k, p in parameters.items() if p.ndim > 1], lambda key: parameters[key])
    )


def layer_shapes(unet: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Module name -> shape of its weight, (out, in) or (out, in, k, k), of linear and convolution layers; by what the layer
    says of itself, since quantised weights are stored in other shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in unet.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, torch.nn.Linear):
            shapes[_plain_name(name)] = (layer.out_features, layer.in_features)
        elif isinstance(layer, torch.nn.Conv2d):
            shapes[_plain_name(name)] = (
                layer.out_channels,
                layer.in_channels // layer.groups,
                *layer.kernel_size,
            )
    return shapes


def _plain_name(name: str) -> str:
    """Without what compiling and adapters put in front of and into names."""
    return name.removeprefix("_orig_mod.").replace(".base_layer", "")


def _some(matrices: Iterable[str], read: Callable[[str], torch.Tensor]) -> dict[str, float]:
    names = sorted(matrices)
    chosen = names[:: max(1, len(names) // _COUNT)][:_COUNT]
    tensors = {name: read(name) for name in chosen}
    return {name: _middle(tensor) for name, tensor in tensors.items() if _is_whole(tensor)}


def _is_whole(tensor: torch.Tensor) -> bool:
    """False for what holds quantised numbers, 8-bit floats, or none."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return is_plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _middle(tensor: torch.Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    return float(flat[flat.numel() // 2])
