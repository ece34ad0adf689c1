"""LoRA adapters on the shared base U-Net: adds, reads, loads and activates them. Only this module imports peft.

peft's own switches (`set_adapter`, `disable_adapters`) also flip requires_grad, which silently cuts gradients between a
forward pass and its backward pass. Here activating an adapter sets one field of every LoRA layer and leaves requires_grad
alone.
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
    """peft's config of a LoRA with alpha = rank, because some tools assume that.

    targets: module names, or a regular expression that they match
    """
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets if isinstance(targets, str) else list(targets)
    )


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
    """The adapter that a forward pass would use now; None: the base alone."""
    for layer in lora_layers(unet):
        if layer.active_adapters:
            return layer.active_adapters[0]
    return None


def activate(
    unet: UNet2DConditionModel, name: str | None, *, layers: list[BaseTunerLayer] | None = None
) -> None:
    """Activates one adapter, or with None the base alone. Leaves requires_grad unchanged.

    Outside autocast peft must cast each layer's input to float32, the dtype of the adapter's weights. Under autocast, which
    casts input and weights to one dtype, peft's cast is wasted, so it is switched off there.
    """
    device = unet.device.type
    casts = not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
    layers = lora_layers(unet) if layers is None else layers
    set_active(layers, [] if name is None else [name])
    for layer in layers:
        layer.cast_input_dtype_enabled = casts


def set_active(layers: Iterable[BaseTunerLayer], names: Sequence[str]) -> None:
    """Makes these adapters the active ones; a layer ignores names that it does not have.

    peft's set_adapter also sets requires_grad of every adapter, so this writes peft's private field `_active_adapter`.
    """
    for layer in layers:
        layer._active_adapter = list(names)


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter by name, in module order."""
    marks = (f".lora_A.{name}.", f".lora_B.{name}.")
    return {key: p for key, p in unet.named_parameters() if any(mark in key for mark in marks)}


def adapter_state(unet: UNet2DConditionModel, name: str) -> dict[str, torch.Tensor]:
    """A copy of one adapter's weights on the CPU, under peft's keys, all of which diffusers loads."""
    state = get_peft_model_state_dict(unet, adapter_name=name)
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}


def load_adapter_state(unet: UNet2DConditionModel, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Loads weights from `adapter_state` into an existing adapter; ValueError unless all keys and shapes are equal."""
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_state(unet, name).items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if expected != given:
        odd = sorted(set(expected.items()) ^ set(given.items()))
        raise ValueError(f"the LoRA does not fit this U-Net and rank: {len(odd)} keys differ, first {odd[0]}")
    result = set_peft_model_state_dict(unet, dict(state), adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys


def adapter_metadata(unet: UNet2DConditionModel, name: str) -> dict:
    """peft's config of an adapter as plain data; a LoRA file stores it so that rank and alpha need not be guessed."""
    return as_plain_data(unet.peft_config[name])


def as_plain_data(config: LoraConfig) -> dict:
    """peft's config in types that JSON supports."""
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
