"""Prompts, and no prompt, as conditioning: by the pipeline's own text encoders, as its kind of network takes them."""

import torch
from diffusers import DiffusionPipeline

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of_pipeline


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: list[str], *, image_size: tuple[int, int], batch_size: int = 32
) -> Conditioning:
    """A row for each prompt; image_size is the (height, width) in pixels that the network is asked for."""
    kind = kind_of_pipeline(pipeline)
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return Conditioning.concat(*(kind.encode(pipeline, chunk, image_size=image_size) for chunk in chunks))


@torch.no_grad()
def encode_unconditional(
    pipeline: DiffusionPipeline, *, image_size: tuple[int, int], kind: str = "auto"
) -> Conditioning:
    """One row that stands for no prompt: the embedding of "" or zeros; auto: zeros for SDXL where its config says so."""
    empty = encode_prompts(pipeline, [""], image_size=image_size)
    if not unconditional_is_zeros(pipeline, kind):
        return empty
    added = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in empty.added_cond_kwargs.items()}
    return Conditioning(torch.zeros_like(empty.encoder_hidden_states), added)


def unconditional_is_zeros(pipeline: DiffusionPipeline, kind: str) -> bool:
    """Of `teacher.unconditional`: whether no prompt is zeros with this pipeline."""
    return kind == "zeros" or (
        kind == "auto" and bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
    )
