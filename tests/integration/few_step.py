"""Helpers for the tests of load_few_step: a pipeline, its latents, and the card's instructions carried out by hand."""

import warnings

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from stepdistill.sampling import FewStepWarning

PROMPT = "a red letter a"


def pipeline_of(teacher):
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, *args, **options):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(
            *args, generator=generator, output_type="latent", height=32, width=32, **options
        ).images


def without_warning(action, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewStepWarning)
        return action(*args, **options)


def by_hand(teacher, folder, **options):
    """Latents of a pipeline set up as the card says: LoRA, scheduler, steps, no guidance."""
    pipeline = pipeline_of(teacher)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return latents(pipeline, PROMPT, **{"num_inference_steps": 4, "guidance_scale": 1.0, **options})
