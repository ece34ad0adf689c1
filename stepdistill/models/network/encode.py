"""Encodes prompts, and the absence of a prompt, into conditioning, with the pipeline's own text encoders."""

import torch
from diffusers import DiffusionPipeline

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import kind_of_pipeline


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: list[str], *, image_size: tuple[int, int], batch_size: int = 32
) -> Conditioning:
    """One row of conditioning per prompt; image_size: (height, width) in pixels, which SDXL is conditioned on."""
    kind = kind_of_pipeline(pipeline)
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return Conditioning.concat(*(kind.encode(pipeline, chunk, image_size=image_size) for chunk in chunks))


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


def unconditional_is_zeros(pipeline: DiffusionPipeline, kind: str) -> bool:
    """Whether `kind`, a value of `teacher.unconditional`, means zeros for this pipeline, not the embedding of ""."""
    return kind == "zeros" or (
        kind == "auto" and bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
    )
