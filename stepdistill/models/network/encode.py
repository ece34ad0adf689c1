"""Encodes prompts, and the absence of a prompt, into conditioning, with the pipeline's own text encoders."""

import torch
from diffusers import DiffusionPipeline

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of_pipeline
from stepdistill.models.network.unet import unconditional_is_zeros
from stepdistill.teacher.layouts import layout_of

_MOST_PROMPTS, _CLIP_TOKENS = 32, 77


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: list[str], *, image_size: tuple[int, int]
) -> Conditioning:
    """One row of conditioning per prompt; image_size: (height, width) in pixels, which SDXL is conditioned on."""
    kind = kind_of_pipeline(pipeline)
    size = prompts_at_once(type(pipeline).__name__)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return Conditioning.concat(*(kind.encode(pipeline, chunk, image_size=image_size) for chunk in chunks))


def prompts_at_once(pipeline_class: str) -> int:
    """How many prompts are encoded at once: few for a text encoder that gives its hidden states at hundreds of tokens."""
    text = layout_of(pipeline_class).text
    return _MOST_PROMPTS if text is None else max(1, _MOST_PROMPTS * _CLIP_TOKENS // text[1])


@torch.no_grad()
def encode_unconditional(
    pipeline: DiffusionPipeline, *, image_size: tuple[int, int], kind: str = "auto"
) -> Conditioning:
    """One row of conditioning that stands for no prompt: the embedding of "" or zeros.

    kind: as `teacher.unconditional`; "auto" means zeros if the pipeline's config says so, as SDXL's does.
    """
    empty = encode_prompts(pipeline, [""], image_size=image_size)
    if not unconditional_is_zeros(pipeline, kind):
        return empty
    added = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in empty.added_cond_kwargs.items()}
    return Conditioning(torch.zeros_like(empty.encoder_hidden_states), added)
