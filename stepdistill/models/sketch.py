"""Which base a LoRA belongs to, told from a U-Net in memory: a few of its weights by name.

A hash of files is another for every way of saving them; these numbers survive half precision, sharding and renaming, and
differ where a base was trained further.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

_COUNT = 32
_TOLERANCE = 0.02
"""Relative: bfloat16 rounds to 0.4 %."""
_MOST_OFF = 0.25
"""Share of the numbers that may be off: fine-tunes move nearly all of them."""
Sketch = dict[str, float]


def sketch_of_folder(folder: Path) -> Sketch:
    """Of the U-Net's weight files in a pipeline's folder; they are not read as a whole."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted((folder / "unet").glob("*.safetensors"))
        ]
        place = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        matrices = [key for key, file in place.items() if len(file.get_slice(key).get_shape()) > 1]
        return _sketch(matrices, lambda key: place[key].get_tensor(key))


def sketch_of(unet: torch.nn.Module) -> Sketch:
    """Of a U-Net in memory, whatever adapters are on it; without its quantised weights."""
    parameters = base_weights(unet)
    return _sketch([k for k, p in parameters.items() if p.ndim > 1], lambda key: parameters[key])


def base_weights(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The base's own parameters by the names that they have without adapters."""
    return {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in unet.named_parameters()
        if ".lora_" not in key
    }


def _sketch(matrices: Iterable[str], read: Callable[[str], torch.Tensor]) -> Sketch:
    names = sorted(matrices)
    chosen = names[:: max(1, len(names) // _COUNT)][:_COUNT]
    tensors = {name: read(name) for name in chosen}
    return {name: _middle(tensor) for name, tensor in tensors.items() if _is_plain(tensor)}


def _is_plain(tensor: torch.Tensor) -> bool:
    """False for what holds quantised numbers, or none."""
    kept = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return kept and tensor.is_floating_point()


def _middle(tensor: torch.Tensor) -> float:
    flat = tensor.detach().reshape(-1)
    return float(flat[flat.numel() // 2])


def differs(expected: Mapping[str, float], found: Mapping[str, float]) -> bool:
    """Whether two sketches are of different bases; False where they share no number."""
    both = [(expected[name], found[name]) for name in expected.keys() & found.keys()]
    off = sum(abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in both)
    return bool(both) and off > _MOST_OFF * len(both)
