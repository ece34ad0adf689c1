"""Identifies the base that a LoRA belongs to by its network: the number of its tensors, and a few of its weights by name.

A hash of files changes with every way of saving them. These numbers survive half precision, sharding and renaming, and they
differ if further training changed a base by more than half precision rounds away.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stepdistill.teacher.facts import TeacherFacts

_COMPILED = "_orig_mod"
"""Attribute in which torch.compile's wrapper keeps the module. It is private; no public name exists."""
_COUNT = 32
_TOLERANCE = 0.02
"""Relative difference up to which two numbers count as equal: bfloat16 rounds to 0.4 %."""
_MAX_OFF = 0.25
"""Fraction of the numbers that may differ: a fine-tune changes nearly all of them."""


@dataclass(frozen=True)
class BaseIdentity:
    """tensors: how many the network has; weights: the middle element of some of its matrices, by name."""

    tensors: int
    weights: dict[str, float]

    @classmethod
    def of_json(cls, raw: Any) -> "BaseIdentity | None":
        """The identity that `as_json` returned as `raw`; None for anything else."""
        tensors, weights = (raw.get("tensors"), raw.get("weights")) if isinstance(raw, dict) else (None, None)
        if type(tensors) is not int or not isinstance(weights, dict):
            return None
        if not all(isinstance(number, int | float) for number in weights.values()):
            return None
        return cls(tensors, weights)

    def as_json(self) -> dict[str, Any]:
        """The identity as plain data."""
        return asdict(self)

    def same_weights(self, other: "BaseIdentity") -> bool | None:
        """Whether the weights are those of one base; None if the two have no weight in common, as with a quantised base."""
        both = [
            (self.weights[name], other.weights[name]) for name in self.weights.keys() & other.weights.keys()
        ]
        off = sum(abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in both)
        return off <= _MAX_OFF * len(both) if both else None


def identity_of_folder(folder: Path) -> BaseIdentity:
    """The identity of the network in a pipeline's folder, from its weight files; only a few tensors are read."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted((folder / TeacherFacts.of_folder(folder).network_part).glob("*.safetensors"))
        ]
        place = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        matrices = [key for key, file in place.items() if len(file.get_slice(key).get_shape()) > 1]
        return BaseIdentity(len(place), _some(matrices, lambda key: place[key].get_tensor(key)))


def identity_of(network: torch.nn.Module) -> BaseIdentity:
    """The identity of a network in memory, with or without adapters, compiled or not; leaves out quantised weights."""
    stored = {_plain_name(key): tensor for key, tensor in network.state_dict().items() if ".lora_" not in key}
    matrices = [key for key, tensor in stored.items() if tensor.ndim > 1]
    return BaseIdentity(len(stored), _some(matrices, lambda key: stored[key]))


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module without torch.compile's wrapper."""
    return getattr(module, _COMPILED, module)


def layer_shapes(unet: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Module name -> shape of its weight, (out, in) or (out, in, k, k), for all linear and convolution layers.

    The shape comes from the layer's attributes, because quantised weights are stored in other shapes.
    """
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
    """The name without the parts that compiling and adapters add to it."""
    return name.removeprefix(f"{_COMPILED}.").replace(".base_layer", "")


def _some(matrices: Iterable[str], read: Callable[[str], torch.Tensor]) -> dict[str, float]:
    names = sorted(matrices)
    chosen = names[:: max(1, len(names) // _COUNT)][:_COUNT]
    tensors = {name: read(name) for name in chosen}
    return {name: _middle(tensor) for name, tensor in tensors.items() if _is_whole(tensor)}


def _is_whole(tensor: torch.Tensor) -> bool:
    """False if the tensor is quantised, holds 8-bit floats, or is on the meta device and holds no numbers."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return is_plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _middle(tensor: torch.Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    return float(flat[flat.numel() // 2])
