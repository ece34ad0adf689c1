"""Teacher, student and discriminator on one base U-Net: a role is a context, and leaving it restores what was.

teacher         the frozen adapter of an earlier rung, or the bare base
student         the adapter that this rung trains
discriminator   encoder and mid-block, with an adapter of its own, or the bare base's, or a full copy
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from stepdistill.models.adapters import activate, adapter_parameters, add_adapter, lora_layers
from stepdistill.models.conditioning import Conditioning, ask

TEACHER, STUDENT, DISCRIMINATOR = "teacher", "student", "discriminator"


@dataclass(frozen=True)
class RoleState:
    """What a forward depends on and a recompute must find again: the active adapter, and whether D takes gradients."""

    adapter: str | None
    discriminator_trainable: bool


class Roles:
    """One base U-Net whose adapters play the roles.

    Args:
        unet: the base, frozen.
        rank: LoRA rank of student and teacher.
        seed: of the student's initial A matrices.
        gradient_checkpointing: recompute activations in the backward, each under the role of its own forward.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, rank: int, seed: int, gradient_checkpointing: bool = False
    ) -> None:
        self.unet = unet
        add_adapter(unet, STUDENT, rank=rank, seed=seed)
        add_adapter(unet, TEACHER, rank=rank, seed=seed)
        self.student_parameters = adapter_parameters(unet, STUDENT)
        self.discriminator_parameters: list[torch.nn.Parameter] = []
        self._further: dict[str, list[torch.nn.Parameter]] = {}
        self.teacher_is_base = True
        self._trunk_adapter: str | None = None
        self._state = RoleState(None, True)
        self._refresh()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing(self.checkpointed)

    def _refresh(self) -> None:
        self._layers = lora_layers(self.unet)
        activate(self.unet, self._state.adapter, layers=self._layers)
        for parameter in chain(self.student_parameters, *self._further.values()):
            parameter.requires_grad_(True)

    def add_trunk_adapter(self, *, rank: int, seed: int) -> list[torch.nn.Parameter]:
        """Gives the discriminator a fresh adapter on encoder and mid-block; an earlier rung's is dropped."""
        self.drop_discriminator()
        parameters = add_adapter(self.unet, DISCRIMINATOR, rank=rank, seed=seed, encoder_only=True)
        self._trunk_adapter = DISCRIMINATOR
        self._refresh()
        return parameters

    def add_role(self, name: str, *, rank: int, seed: int) -> list[torch.nn.Parameter]:
        """A further adapter on the whole U-Net, for `role(name)`: a fake score. Its parameters take gradients."""
        self._further[name] = add_adapter(self.unet, name, rank=rank, seed=seed)
        self._refresh()
        return self._further[name]

    def drop_discriminator(self) -> None:
        """Forgets the discriminator's adapter and parameters, as at the end of a phase."""
        if self._trunk_adapter is not None:
            self.unet.delete_adapters(DISCRIMINATOR)
        self._trunk_adapter = None
        self.discriminator_parameters = []
        self._refresh()

    @property
    def state(self) -> RoleState:
        """The role in force."""
        return self._state

    @contextmanager
    def restored(self, state: RoleState) -> Iterator[None]:
        """Puts `state` in force inside the context; what was before comes back after it, whatever happens."""
        before = self._state
        self._enter(state)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, state: RoleState) -> None:
        if state.adapter != self._state.adapter:
            activate(self.unet, state.adapter, layers=self._layers)
        if state.discriminator_trainable != self._state.discriminator_trainable:
            for parameter in self.discriminator_parameters:
                parameter.requires_grad_(state.discriminator_trainable)
        self._state = state

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """The frozen teacher; no gradients inside."""
        adapter = None if self.teacher_is_base else TEACHER
        with torch.no_grad(), self.restored(RoleState(adapter, self._state.discriminator_trainable)):
            yield

    @contextmanager
    def student(self) -> Iterator[None]:
        """The student."""
        with self.restored(RoleState(STUDENT, self._state.discriminator_trainable)):
            yield

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """A role that `add_role` made."""
        with self.restored(RoleState(name, self._state.discriminator_trainable)):
            yield

    @contextmanager
    def discriminator(self, *, trainable: bool) -> Iterator[None]:
        """D's trunk; trainable=False lets gradients through to the sample and none into D."""
        with self.restored(RoleState(self._trunk_adapter, trainable)):
            yield

    def checkpointed(self, module: torch.nn.Module, *args: object) -> object:
        """diffusers' gradient_checkpointing_func: the recompute runs under the role of the forward, not of the moment."""
        state = self._state
        return checkpoint(
            module.__call__,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), self.restored(state)),
        )

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The raw output (B, C, H, W) of the role in force, in the dtype of `sample`; inputs go in the U-Net's dtype."""
        return ask(self.unet, sample, timesteps, conditioning)
