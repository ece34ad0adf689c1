"""One base network in memory, shared by all denoisers: each one uses an adapter on it, or the base alone.

teacher         the base alone, or the frozen adapter of an earlier rung
student         the adapter that this rung trains
discriminator   an adapter on the part that gives features
fake_score      an adapter that learns the student's images, for distribution matching

Entering a context activates an adapter; leaving it activates the previous one again. Trained parameters belong to named
groups, and a frozen group receives no gradients: so gradients pass through the discriminator to a sample without reaching
the discriminator's parameters.

All passes compute in the base's dtype, without autocast, which would cast weights and activations again and again. The
trained weights have float32 masters (trained_weights.py).
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from stepdistill.models.adapters import (
    active_adapter,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    file_key,
    lora_layers,
    set_active,
)
from stepdistill.models.lora_file import Lora
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of
from stepdistill.models.trained_weights import TrainedWeights

TEACHER, STUDENT, DISCRIMINATOR, FAKE_SCORE = "teacher", "student", "discriminator", "fake_score"
_COMPILED_VARIANTS = 256
"""How many variants of one block may be compiled: for each width, adapter, image size, and with and without gradients."""


@dataclass(frozen=True)
class NetworkState:
    """The active adapter (None: the base alone) and the frozen groups.

    A forward pass depends on both, so its recomputation under gradient checkpointing restores them.
    """

    adapter: str | None = None
    frozen: frozenset[str] = frozenset()


class SharedNetwork:
    """A frozen base with adapters.

    Args:
        model: the base network, such as a UNet2DConditionModel.
        gradient_checkpointing: recompute activations in the backward pass, each in the state of its forward pass.
        compiles: compile the repeated blocks, each once per adapter. They lie inside of what is recomputed at once, so the
            recomputation runs compiled code too.
        sizes_vary: compile for any image size; otherwise each size and width gets code of its own, which is faster.
    """

    def __init__(
        self,
        model: Any,
        *,
        gradient_checkpointing: bool = False,
        compiles: bool = False,
        sizes_vary: bool = False,
    ) -> None:
        self.model, self.kind = model, kind_of(model)
        # asking a diffusers model for these walks through all its modules, 33 ms for SDXL
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._state = NetworkState()
        self._groups: dict[str, TrainedWeights] = {}
        self._outside: dict[str, list[torch.nn.Parameter]] = {}  # of each group, those that are not in a LoRA
        self._active = active_adapter(model)
        self._parked: set[str] = set()
        self._kept: frozenset[torch.nn.Module] = frozenset()
        self._latent_size = (0, 0)  # of the last forward pass
        self._compiles, self._sizes_vary = compiles, sizes_vary
        if gradient_checkpointing:
            model.enable_gradient_checkpointing(self.checkpointed)
        self.compile_blocks(model)

    @classmethod
    def with_student_and_teacher(
        cls,
        model: Any,
        *,
        rank: int,
        seed: int,
        gradient_checkpointing: bool = False,
        compiles: bool = False,
        sizes_vary: bool = False,
    ) -> "SharedNetwork":
        """The base with two adapters of this rank: the student's, which trains, and one to hold an earlier rung."""
        network = cls(
            model, gradient_checkpointing=gradient_checkpointing, compiles=compiles, sizes_vary=sizes_vary
        )
        network.add_adapter(STUDENT, rank=rank, seed=seed)
        network.add_adapter(TEACHER, rank=rank, seed=seed, trains=False)
        return network

    @classmethod
    def trained_whole(
        cls,
        model: Any,
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
        compiles: bool = False,
        sizes_vary: bool = False,
    ) -> "SharedNetwork":
        """A network without adapters, all of whose weights are the student's and are trained: it computes in `dtype`, with
        masters in float32, which is the dtype of `model` before."""
        network = cls(
            model, gradient_checkpointing=gradient_checkpointing, compiles=compiles, sizes_vary=sizes_vary
        )
        network.dtype = dtype
        network.set_group(STUDENT, dict(model.named_parameters()))
        return network

    def compile_blocks(self, model: torch.nn.Module) -> None:
        """Compiles the repeated blocks of the network, or of a copy of a part of it; does nothing unless `compiles`."""
        if not self._compiles:
            return
        # one code object for all blocks of a class: torch falls back to eager code, with one warning, beyond the limit
        torch._dynamo.config.recompile_limit = _COMPILED_VARIANTS
        torch._dynamo.config.accumulated_recompile_limit = 4 * _COMPILED_VARIANTS
        for module in model.modules():
            if isinstance(module, self.kind.compiled_blocks):
                # False: otherwise torch takes the second width of a block's class for a varying one
                module.compile(dynamic=None if self._sizes_vary else False)

    def add_adapter(
        self, name: str, *, rank: int, seed: int, trains: bool = True, encoder_only: bool = False
    ) -> dict[str, torch.nn.Parameter]:
        """Adds an adapter that changes nothing yet; returns its parameters, which form a group of that name if it trains.

        encoder_only: adapt only the part that gives features.
        """
        targets = self.kind.encoder_lora_targets(self.model) if encoder_only else self.kind.lora_targets
        parameters = add_adapter(self.model, name, targets=targets, rank=rank, seed=seed)
        self._adapters_changed()
        if trains:
            self.set_group(name, parameters)
        else:
            for parameter in parameters.values():
                parameter.data = parameter.data.to(self.dtype)
        return parameters

    def add_frozen_lora(self, name: str, lora: Lora) -> None:
        """Adds a LoRA as an adapter that does not train; ValueError if it changes a layer that has no adapter here."""
        self.add_adapter(name, rank=lora.rank, seed=0, trains=False)
        state = {key: torch.zeros(shape) for key, shape in self.adapter_shapes(name).items()}
        for layer_name, layer in lora.layers.items():
            down, up = (f"{layer_name}.lora_{side}.weight" for side in ("A", "B"))
            if down not in state:
                raise ValueError(f"{layer_name} has no adapter in this network")
            state[down][: layer.rank] = layer.down.float()
            state[up][:, : layer.rank] = layer.scale * layer.up.float()
        self.load_adapter_state(name, state)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter and its group."""
        set_active(lora_layers(self.model), [])  # else peft warns that the active adapter is deleted
        self.model.delete_adapters(name)
        self.remove_group(name)
        self._adapters_changed()

    def park(self, name: str) -> None:
        """Moves an adapter that does not train to the CPU, until it is used again."""
        if name in self._parked:
            return
        self._move(name, torch.device("cpu"))
        self._parked.add(name)

    def _move(self, name: str, device: torch.device) -> None:
        for parameter in adapter_parameters(self.model, name).values():
            parameter.data = parameter.data.to(device)

    def adapter_state(self, name: str) -> dict[str, torch.Tensor]:
        """A copy of one adapter's weights on the CPU, under peft's keys, all of which diffusers loads."""
        weights = self._adapter_weights(name)
        return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in weights.items()}

    def adapter_shapes(self, name: str) -> dict[str, torch.Size]:
        """The shapes of one adapter's weights, under peft's keys."""
        return {key: tensor.shape for key, tensor in self._adapter_weights(name).items()}

    def load_adapter_state(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Loads weights from `adapter_state` into an existing adapter; ValueError unless all keys and shapes are equal."""
        copy_adapter(self._adapter_weights(name), state)
        if name in self._groups:
            self._groups[name].refresh()

    def _adapter_weights(self, name: str) -> dict[str, torch.Tensor]:
        """The weights of an adapter by their file keys, in float32 if it trains."""
        masters = self._groups[name].masters() if name in self._groups else {}
        parameters = adapter_parameters(self.model, name)
        if not parameters:  # all weights of the network are trained
            return masters
        return {
            file_key(key, name): masters.get(key, parameter.data) for key, parameter in parameters.items()
        }

    def set_group(
        self, name: str, parameters: Mapping[str, torch.nn.Parameter], *, float32: Collection[str] = ()
    ) -> None:
        """Makes the group `name`: its parameters receive gradients whenever the group is not frozen.

        The network computes with them in its own dtype, or in float32 with those named in `float32`.
        """
        self._groups[name] = TrainedWeights(parameters, dtype=self.dtype, float32=float32)
        self._outside[name] = [p for key, p in parameters.items() if f".{name}." not in key]
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._set_requires_grad([name])

    def remove_group(self, name: str) -> None:
        """Removes a group, if there is one."""
        self._groups.pop(name, None)
        self._outside.pop(name, None)

    def weights(self, name: str) -> TrainedWeights:
        """The trained weights of a group; KeyError if there is no such group."""
        return self._groups[name]

    def group(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The trained parameters of a group, by parameter name; empty if there is no such group."""
        return self._groups[name].parameters if name in self._groups else {}

    @property
    def state(self) -> NetworkState:
        """The current state."""
        return self._state

    def using(
        self, adapter: str | None, *, frozen: Collection[str] | None = None
    ) -> AbstractContextManager[None]:
        """Inside the context this adapter is active and these groups are frozen; None keeps the groups that were frozen."""
        state = NetworkState(adapter, self._state.frozen if frozen is None else frozenset(frozen))
        return _InState(self, state)

    def enter(self, state: NetworkState) -> None:
        """Changes the state, until the next change; `using` restores it."""
        if state.adapter in self._parked:
            self._parked.remove(state.adapter)
            self._move(state.adapter, self.device)
        changed = state.frozen ^ self._state.frozen
        self._state = state
        self._active.name, self._active.is_frozen = state.adapter, state.adapter in state.frozen
        self._set_requires_grad(changed)

    def _set_requires_grad(self, groups: Collection[str]) -> None:
        """Freezes or thaws what a group has outside of LoRA layers, which read `is_frozen` themselves."""
        for name in groups:
            for parameter in self._outside.get(name, ()):
                parameter.requires_grad_(name not in self._state.frozen)

    def _adapters_changed(self) -> None:
        """Restores the current state, because peft changes requires_grad when an adapter is added or removed."""
        self._active = active_adapter(self.model)
        self.enter(self._state)
        for group in self._groups.values():
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        self._set_requires_grad(list(self._groups))

    def checkpointed(self, module: torch.nn.Module, *args: object) -> object:
        """diffusers' gradient_checkpointing_func: recomputes in the state of the forward pass, not of the backward pass."""
        if module in self._kept:
            return module(*args)
        state = self._state
        return checkpoint(
            module.__call__,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # the network is in eval mode and draws no random numbers
            context_fn=lambda: (nullcontext(), _InState(self, state)),
        )

    def keep_activations(self, names: Collection[str]) -> None:
        """Under gradient checkpointing, keeps the activations of these modules of the network in place of computing them
        again; those of all others are computed again. The results are the same to the bit."""
        modules = dict(self.model.named_modules())
        self._kept = frozenset(modules[name] for name in names)

    def modules_at(self, taps: Collection[str]) -> list[str]:
        """The names of the modules at these taps: places such as "middle", or names. ValueError if there is none."""
        names = dict.fromkeys(name for tap in taps for name in self.kind.modules_at(self.model, tap))
        return list(names)

    @contextmanager
    def tapped(self, names: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Inside it, the outputs of these modules are kept by name: those of the first forward pass."""
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str, output: Any) -> None:
            if name not in outputs:
                outputs[name] = self.kind.image_part(self.model, output, self._latent_size)

        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _module, _args, output, name=name: keep(name, output)
            )
            for name in names
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def ask(self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Forward pass with the active adapter: the output (B, C, H, W) in the dtype of `sample`."""
        self._latent_size = (sample.shape[-2], sample.shape[-1])
        output = self.kind.ask(self.model, sample.to(self.dtype), timesteps, conditioning)
        return output.to(sample.dtype)


class _InState(AbstractContextManager[None]):
    """A context in which a network is in a state; it may be entered again, as by a second backward pass of one graph."""

    def __init__(self, network: SharedNetwork, state: NetworkState) -> None:
        self._network, self._state = network, state
        self._before: list[NetworkState] = []

    def __enter__(self) -> None:
        self._before.append(self._network.state)
        self._network.enter(self._state)

    def __exit__(self, *_: object) -> None:
        self._network.enter(self._before.pop())


def as_map(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, H, W): as they are, or from those of a transformer block, (B, H W, C); square if that is possible."""
    if features.ndim == 4:
        return features
    rows, positions, channels = features.shape
    side = math.isqrt(positions)
    shape = (side, side) if side * side == positions else (positions, 1)
    return features.transpose(1, 2).reshape(rows, channels, *shape)
