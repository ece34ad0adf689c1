"""LoRA adapters on the one base U-Net: added, read, written, switched. Owns peft.

peft's own switches (`set_adapter`, `disable_adapters`) also flip requires_grad, which silently cuts gradients between a
forward and its backward. Here the active adapter is one field of every LoRA layer, and gradients are nobody's side effect.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from stepdistill.models.network.unet import LORA_TARGETS


def lora_config(rank: int, *, targets: Sequence[str] | str = LORA_TARGETS) -> LoraConfig:
    """alpha = rank, so that every tool that assumes it is right; targets: module names, or a regular expression of them."""
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets if isinstance(targets, str) else list(targets)
    )


def lora_parameters(shapes: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """How many numbers `add_adapter` adds to a U-Net whose layers have these shapes (models/identity.py): for each adapted
    layer rank x in, times the kernel of a convolution, and out x rank."""
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
    """Adds a LoRA that changes nothing yet (B = 0), A drawn from `seed`, and returns its parameters by name, in float32.

    Which adapter is active stays as it was: none, for the first one.
    """
    active = active_adapter(unet)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # several adapters are the idea
        torch.manual_seed(seed)
        unet.add_adapter(lora_config(rank, targets=targets), adapter_name=name)
    parameters = adapter_parameters(unet, name)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    activate(unet, active)
    for layer in lora_layers(unet):
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    return parameters


def lora_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """The layers that carry adapters, in module order."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def active_adapter(unet: UNet2DConditionModel) -> str | None:
    """The adapter that a forward would use now; None is the bare base."""
    for layer in lora_layers(unet):
        if layer.active_adapters:
            return layer.active_adapters[0]
    return None


def activate(
    unet: UNet2DConditionModel, name: str | None, *, layers: list[BaseTunerLayer] | None = None
) -> None:
    """Makes one adapter, or with None none, the active one. Leaves requires_grad alone.

    Called under autocast, which brings a layer's input and the adapter's float32 weights to one dtype, it also stops peft
    from copying every input to float32 first, for autocast to copy it back. Elsewhere peft's copy is what makes them fit.
    """
    device = unet.device.type
    casts = not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
    layers = lora_layers(unet) if layers is None else layers
    set_active(layers, [] if name is None else [name])
    for layer in layers:
        layer.cast_input_dtype_enabled = casts


def set_active(layers: Iterable[BaseTunerLayer], names: Sequence[str]) -> None:
    """Makes these adapters the active ones; a layer passes over names that it has not.

    peft's own set_adapter also sets requires_grad of every adapter, so this writes its private `_active_adapter`.
    """
    for layer in layers:
        layer._active_adapter = list(names)


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter by name, in module order."""
    marks = (f".lora_A.{name}.", f".lora_B.{name}.")
    return {key: p for key, p in unet.named_parameters() if any(mark in key for mark in marks)}


def adapter_state(unet: UNet2DConditionModel, name: str) -> dict[str, torch.Tensor]:
    """A copy of one adapter under peft's own keys, which diffusers loads in full, on the CPU."""
    state = get_peft_model_state_dict(unet, adapter_name=name)
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}


def load_adapter_state(unet: UNet2DConditionModel, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Puts weights of `adapter_state` into an existing adapter; ValueError where keys or shapes do not fit exactly."""
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_state(unet, name).items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))
        raise ValueError(f"the LoRA does not fit this U-Net and rank: {len(odd)} keys differ, first {odd[0]}")
    result = set_peft_model_state_dict(unet, dict(state), adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys


def adapter_metadata(unet: UNet2DConditionModel, name: str) -> dict:
    """peft's config of an adapter as plain data, which a LoRA file carries so that rank and alpha need no guessing."""
    return as_plain_data(unet.peft_config[name])


def as_plain_data(config: LoraConfig) -> dict:
    """peft's config as JSON can hold it."""
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
