"""LoRA adapters on the shared base U-Net: adds, reads and loads them. Only this module and lora_layers.py import peft.

peft's own switches (`set_adapter`, `disable_adapters`) also flip requires_grad, which silently cuts gradients between a
forward pass and its backward pass. Here all layers read one shared `ActiveAdapter`, and requires_grad stays as it is.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from stepdistill.models.lora_layers import ActiveAdapter, lora_config
from stepdistill.models.network.unet import LORA_TARGETS


def lora_parameters(shapes: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """The number of parameters that `add_adapter` adds to a U-Net whose layers have these shapes (models/identity.py).

    For each adapted layer: rank x in, times the size of a convolution's kernel, plus out x rank.
    """
    adapted = [
        shape for name, shape in shapes.items() if any(f".{name}".endswith(f".{t}") for t in LORA_TARGETS)
    ]
    return sum(rank * (math.prod(shape[1:]) + shape[0]) for shape in adapted)


def add_adapter(
    unet: UNet2DConditionModel,
    name: str,
    *,
    rank: int,
    seed: int,
    targets: Sequence[str] | str = LORA_TARGETS,
) -> dict[str, torch.nn.Parameter]:
    """Adds a LoRA that changes nothing yet (B = 0; A is drawn from `seed`); returns its float32 parameters by name.

    It does not become active: the active adapter stays the same, or none if this is the first one. requires_grad is False
    for all adapters afterwards.
    """
    active = active_adapter(unet)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # having several adapters is intended
        torch.manual_seed(seed)
        config = lora_config(rank, targets=targets if isinstance(targets, str) else list(targets))
        unet.add_adapter(config, adapter_name=name)
    parameters = adapter_parameters(unet, name)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    for layer in lora_layers(unet):
        layer.active = active
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    return parameters


def lora_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """The layers that carry adapters, in module order."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def active_adapter(unet: UNet2DConditionModel) -> ActiveAdapter:
    """The object that all LoRA layers of a network read; a new one, which no layer reads, if it has no adapter yet."""
    layers = (module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    first = next(layers, None)
    return ActiveAdapter() if first is None else first.active


def set_active(layers: Iterable[BaseTunerLayer], names: Sequence[str]) -> None:
    """Makes these adapters the active ones for peft and its own layers; a layer ignores names that it does not have.

    peft's set_adapter also sets requires_grad of every adapter, so this writes peft's private field `_active_adapter`.
    """
    for layer in layers:
        layer._active_adapter = list(names)


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter by name, in module order."""
    marks = (f".lora_A.{name}.", f".lora_B.{name}.")
    return {key: p for key, p in unet.named_parameters() if any(mark in key for mark in marks)}


def file_key(parameter_name: str, adapter: str) -> str:
    """The key under which peft and diffusers save an adapter's parameter: its name without the adapter's."""
    return parameter_name.replace(f".{adapter}.weight", ".weight")


def copy_adapter(target: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into the tensors of an adapter, both by their file keys; ValueError unless all keys and shapes are
    equal."""
    expected = {key: tuple(tensor.shape) for key, tensor in target.items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))
        raise ValueError(f"the LoRA does not fit this U-Net and rank: {len(odd)} keys differ, first {odd[0]}")
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(state[key])


def adapter_metadata(unet: UNet2DConditionModel, name: str) -> dict:
    """peft's config of an adapter as plain data; a LoRA file stores it so that rank and alpha need not be guessed."""
    return as_plain_data(unet.peft_config[name])


def as_plain_data(config: LoraConfig) -> dict:
    """peft's config in types that JSON supports."""
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
