"""One base network in memory, shared by all denoisers: each one uses an adapter on it, or the base alone.

teacher         the base alone, or the frozen adapter of an earlier rung
student         the adapter that this rung trains
discriminator   an adapter on the part that gives features

Entering a context activates an adapter; leaving it activates the previous one again. Trained parameters belong to named
groups, and a frozen group receives no gradients: so gradients pass through the discriminator to a sample without reaching
the discriminator's parameters.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from stepdistill.models.adapters import activate, add_adapter, lora_layers
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of

TEACHER, STUDENT, DISCRIMINATOR = "teacher", "student", "discriminator"


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
    """

    def __init__(self, model: Any, *, gradient_checkpointing: bool = False) -> None:
        self.model, self.kind = model, kind_of(model)
        self._state = NetworkState()
        self._groups: dict[str, dict[str, torch.nn.Parameter]] = {}
        self._layers = lora_layers(model)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing(self.checkpointed)

    @classmethod
    def with_student_and_teacher(
        cls, model: Any, *, rank: int, seed: int, gradient_checkpointing: bool = False
    ) -> "SharedNetwork":
        """The base with two adapters of this rank: the student's, which trains, and one to hold an earlier rung."""
        network = cls(model, gradient_checkpointing=gradient_checkpointing)
        network.add_adapter(STUDENT, rank=rank, seed=seed)
        network.add_adapter(TEACHER, rank=rank, seed=seed, trains=False)
        return network

    def add_adapter(
        self, name: str, *, rank: int, seed: int, trains: bool = True, encoder_only: bool = False
    ) -> dict[str, torch.nn.Parameter]:
        """Adds an adapter that changes nothing yet; returns its parameters, which form a group of that name if it trains.

        encoder_only: adapt only the part that gives features.
        """
        targets = self.kind.encoder_lora_targets if encoder_only else self.kind.lora_targets
        parameters = add_adapter(self.model, name, targets=targets, rank=rank, seed=seed)
        if trains:
            self._groups[name] = parameters
        self._layers_changed()
        return parameters

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter and its group."""
        self.model.delete_adapters(name)
        self._groups.pop(name, None)
        self._layers_changed()

    def set_group(self, name: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Sets or replaces the group `name`: its parameters receive gradients whenever the group is not frozen."""
        self._groups[name] = dict(parameters)
        self._set_requires_grad([name])

    def group(self, name: str) -> dict[str, torch.nn.Parameter]:
        """The trained parameters of a group, by parameter name; empty if there is no such group."""
        return self._groups.get(name, {})

    @property
    def state(self) -> NetworkState:
        """The current state."""
        return self._state

    @contextmanager
    def using(self, adapter: str | None, *, frozen: Collection[str] | None = None) -> Iterator[None]:
        """Inside the context this adapter is active and these groups are frozen; None keeps the groups that were frozen."""
        state = NetworkState(adapter, self._state.frozen if frozen is None else frozenset(frozen))
        with self._restored(state):
            yield

    @contextmanager
    def _restored(self, state: NetworkState) -> Iterator[None]:
        before = self._state
        self._enter(state)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, state: NetworkState) -> None:
        changed = state.frozen ^ self._state.frozen
        if state.adapter != self._state.adapter:
            activate(self.model, state.adapter, layers=self._layers)
        self._state = state
        self._set_requires_grad(changed)

    def _set_requires_grad(self, groups: Collection[str]) -> None:
        for name in groups:
            for parameter in self.group(name).values():
                parameter.requires_grad_(name not in self._state.frozen)

    def _layers_changed(self) -> None:
        """Restores the current state, because peft changes the active adapter and requires_grad when an adapter is added or
        removed."""
        self._layers = lora_layers(self.model)
        activate(self.model, self._state.adapter, layers=self._layers)
        self._set_requires_grad(list(self._groups))

    def checkpointed(self, module: torch.nn.Module, *args: object) -> object:
        """diffusers' gradient_checkpointing_func: recomputes in the state of the forward pass, not of the backward pass."""
        state = self._state
        return checkpoint(
            module.__call__,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self._restored(state)),
        )

    def ask(self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Forward pass with the active adapter: the output (B, C, H, W) in the dtype of `sample`."""
        return self.kind.ask(self.model, sample, timesteps, conditioning)
