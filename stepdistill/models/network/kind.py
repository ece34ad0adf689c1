"""What the package needs from a network of any architecture; `KINDS` lists the architectures that are supported.

A new architecture takes one file beside unet.py with a class that implements NetworkKind, and one entry in `KINDS`. What a
pipeline's folder holds depends on it too: its parts in teacher/layouts.py, a call of its network by shapes alone in
teacher/examine.py (`_ASKED`), and values of its config that are not supported in teacher/folder.py. So do the exports for
other tools (export/); and teacher/families.py has the configs of released models, for plans without their files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from stepdistill.config import ConfigError
from stepdistill.config.sections import Quantization
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.sd3 import SD3Kind
from stepdistill.models.network.unet import UNetKind
from stepdistill.models.network.z_image import ZImageKind
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import load_part


class NetworkKind(Protocol):
    """One architecture. Each method gets the network as an argument, so it works with any adapter on that network."""

    @property
    def component(self) -> str:
        """Name of the network among the pipeline's components and folders, such as "unet"."""

    @property
    def network_class(self) -> type[Any]:
        """The network's class in diffusers."""

    @property
    def pipeline_classes(self) -> tuple[type[Any], ...]:
        """The pipeline classes that use this network."""

    @property
    def lora_targets(self) -> Sequence[str]:
        """Names of the modules that a LoRA adapts, in the form that peft expects."""

    def encoder_lora_targets(self, network: Any) -> str:
        """Regular expression, for peft, of the modules that a discriminator's LoRA adapts: those that `features` runs."""

    def random_conditioning(self, facts: TeacherFacts, rows: int, *, dtype: torch.dtype) -> Conditioning:
        """Conditioning of the shapes that the network of these configs gets, with random values, on the default device."""

    def ask(
        self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Forward pass: the network's output (B, C, H, W); sample and embeddings are in the network's dtype."""

    def features(
        self, network: Any, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Features (B, C_i, H_i, W_i) inside the network, from shallow to deep; sample and embeddings are in its dtype."""

    def modules_at(self, network: Any, tap: str) -> Sequence[str]:
        """The names of the modules at a tap: a place ("encoder", "middle", "decoder"), or one module's name. ValueError if
        there is no such module."""

    def image_part(self, network: Any, output: Any, latent_size: tuple[int, int]) -> torch.Tensor:
        """The image's features in what a module gives, which may be several tensors, or the tokens of image and text in
        one; latent_size: (height, width) of the latents."""

    def call_options(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call without which its text is longer than what `encode` gives."""

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """The `guidance_scale` of the pipeline's call that means this one here, where 1 is off."""

    def unconditional_options(self, pipeline: Any, unconditional: str, count: int) -> dict[str, Any]:
        """Arguments of the pipeline's call with `count` prompts that make its guidance take teacher.unconditional as the
        input for no prompt; the pipeline's own config may be changed too."""

    def encode(self, pipeline: Any, prompts: list[str], *, image_size: tuple[int, int]) -> Conditioning:
        """One row of conditioning per prompt, from the pipeline's text encoders; image_size: (height, width) in pixels."""

    def feature_shapes(self, network: Any, sample_size: int) -> list[tuple[int, int]]:
        """(channels, smaller side) of each of these features, for latents whose smaller side is sample_size."""

    @property
    def compiled_blocks(self) -> tuple[type[Any], ...]:
        """The classes of the repeated modules that are compiled one by one if training.compile is on."""

    def encoder_copy(self, network: Any) -> Any:
        """A copy of the part that `features` runs, so that all its weights can be trained."""


KINDS: list[NetworkKind] = [UNetKind(), SD3Kind(), ZImageKind()]


def kind_of(network: object) -> NetworkKind:
    """The NetworkKind of this network; ValueError if its architecture is not supported."""
    return _first("network", network, [(kind.network_class, kind) for kind in KINDS])


def kind_of_pipeline(pipeline: object) -> NetworkKind:
    """The NetworkKind of this pipeline's network, which need not be loaded; ValueError if it is not supported."""
    return _first("pipeline", pipeline, [(p, kind) for kind in KINDS for p in kind.pipeline_classes])


def kind_of_facts(facts: TeacherFacts) -> NetworkKind:
    """The NetworkKind of a pipeline's configs; the U-Net's for a pipeline that is unknown."""
    named = (k for k in KINDS if facts.pipeline_class in [p.__name__ for p in k.pipeline_classes])
    return next(named, KINDS[0])


def build_network(facts: TeacherFacts) -> Any:
    """A network of a pipeline's configs with random weights, frozen, in eval mode, on the default device."""
    network = kind_of_facts(facts).network_class.from_config(dict(facts.network))
    return network.eval().requires_grad_(False)


def load_network(
    folder: Path, *, dtype: torch.dtype = torch.float32, quantization: Quantization = "none"
) -> Any:
    """The network of a pipeline's folder, frozen, in eval mode.

    ConfigError if the pipeline is not supported, or if a weight is missing or cannot be loaded.
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
