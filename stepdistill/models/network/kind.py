"""What the package asks of a network, whatever its architecture; `KINDS` says which class answers for which model.

A new architecture is one file beside unet.py with a class that answers, and one line in `KINDS`. The checks of a teacher's
folder (teacher/folder.py) and the exports for other tools (export/) know the architecture too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from stepdistill.config import ConfigError
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.unet import UNetKind
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import load_part


class NetworkKind(Protocol):
    """What is known of one architecture. Networks are passed in, so an answer holds for every adapter on them."""

    @property
    def component(self) -> str:
        """The part of a pipeline that is the network, such as "unet"; also its folder."""

    @property
    def network_class(self) -> type[Any]:
        """Its class in diffusers."""

    @property
    def pipeline_classes(self) -> tuple[type[Any], ...]:
        """The pipelines that it is the network of."""

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

    def encode(self, pipeline: Any, prompts: list[str], *, image_size: tuple[int, int]) -> Conditioning:
        """A row of conditioning for each prompt, by the pipeline's text encoders; image_size: (height, width) in pixels."""

    def feature_shapes(self, network: Any, sample_size: int) -> list[tuple[int, int]]:
        """(channels, smaller side) of each of these features for latents of this smaller side."""

    def encoder_copy(self, network: Any) -> Any:
        """A copy of what `features` needs, to be trained whole."""


KINDS: list[NetworkKind] = [UNetKind()]


def kind_of(network: object) -> NetworkKind:
    """Who answers for this network; ValueError for an architecture that nobody answers for."""
    return _first("network", network, [(kind.network_class, kind) for kind in KINDS])


def kind_of_pipeline(pipeline: object) -> NetworkKind:
    """Who answers for this pipeline's network, which need not be loaded; ValueError as above."""
    return _first("pipeline", pipeline, [(p, kind) for kind in KINDS for p in kind.pipeline_classes])


def load_network(folder: Path, *, dtype: torch.dtype = torch.float32, quantization: str = "none") -> Any:
    """The network of a pipeline's folder, frozen, in eval mode.

    ConfigError where it cannot be loaded to the last weight, and where "int8" is asked for and torchao is not installed.
    """
    named = TeacherFacts.of_folder(folder).pipeline_class
    kinds = {pipeline.__name__: kind for kind in KINDS for pipeline in kind.pipeline_classes}
    if named not in kinds:
        raise ConfigError(f"teacher.path: {folder} holds a {named}; allowed: {', '.join(kinds)}")
    kind = kinds[named]
    return load_part(kind.network_class, folder, kind.component, dtype=dtype, quantization=quantization)


def _first(what: str, model: object, kinds: Sequence[tuple[type[Any], NetworkKind]]) -> NetworkKind:
    for model_class, kind in kinds:
        if isinstance(model, model_class):
            return kind
    names = ", ".join(model_class.__name__ for model_class, _ in kinds)
    raise ValueError(f"{what}: got {type(model).__name__}; allowed: {names}")
