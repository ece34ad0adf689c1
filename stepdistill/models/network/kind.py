"""What the package asks of a network, whatever its architecture; `KINDS` says which class answers for which model.

A new architecture is one file beside unet.py with a class that answers, and one line in `KINDS`. Loading a U-Net
(models/loading.py) and exporting one (export/) know the architecture too.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.unet import UNetKind


class NetworkKind(Protocol):
    """What is known of one architecture. Networks are passed in, so an answer holds for every adapter on them."""

    @property
    def lora_targets(self) -> Sequence[str]:
        """Names of the modules that a LoRA trains, as peft takes them."""

    @property
    def encoder_lora_targets(self) -> str:
        """The same of the part that `features` runs, as peft's regular expression: what a discriminator's trunk trains."""

    def ask(
        self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The network's output (B, C, H, W) in the dtype of `sample`."""

    def features(
        self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Features (B, C_i, H_i, W_i) inside the network, from shallow to deep."""

    def feature_shapes(self, network: Any, sample_size: int) -> list[tuple[int, int]]:
        """(channels, smaller side) of each of these features for latents of this smaller side."""

    def encoder_copy(self, network: Any) -> Any:
        """A copy of what `features` needs, to be trained whole."""


KINDS: dict[type, NetworkKind] = {UNet2DConditionModel: UNetKind()}


def kind_of(network: object) -> NetworkKind:
    """Who answers for this network; ValueError for an architecture that nobody answers for."""
    for network_class, kind in KINDS.items():
        if isinstance(network, network_class):
            return kind
    names = ", ".join(network_class.__name__ for network_class in KINDS)
    raise ValueError(f"network: got {type(network).__name__}; allowed: {names}")
