"""Trains the reader and the teacher of a world of rendered images. The package ships those of the letters."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from stepdistill.demo import pairs_teacher
from stepdistill.demo import teacher as recipe
from stepdistill.demo.letters import Triple
from stepdistill.demo.pairs import Pair
from stepdistill.demo.reader import OF_LETTERS, OF_PAIRS, Questions, Reader, save_reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How much is trained.

    images                                renderings to learn from
    reader_steps, vae_steps, unet_steps   updates, of 64, 32 and 64 images
    widths                                of the U-Net's two levels
    device                                where the U-Net is trained
    """

    images: int
    reader_steps: int
    vae_steps: int
    unet_steps: int
    widths: tuple[int, int] = recipe.WIDTHS
    device: str = "cpu"
    seed: int = 0


RECIPES = {
    "letters": Training(30_000, reader_steps=1800, vae_steps=2200, unet_steps=5000),
    "pairs": Training(
        40_000, reader_steps=3000, vae_steps=1800, unet_steps=5000, widths=pairs_teacher.WIDTHS
    ),
}
"""How the reader and the teacher of each world are trained."""
_CARDS = {
    "letters": """---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, stable-diffusion, tiny]
---
# The letters teacher

A complete, very small Stable Diffusion, trained from nothing: 32 x 32 capital letters of 22 real typefaces in colour, for
captions such as "a purple letter m on pink" (26 letters; red, green, blue, black, purple ink; white, yellow, pink, gray
paper). Typeface, angle, size and place are its own choice. It exists to be distilled; sample it with guidance 3.

AutoencoderKL (24, 48, 48) with 4 x 8 x 8 latents; CLIPTextModel of width 64 with 2 layers; UNet2DConditionModel ({widths}),
{parameters:.1f} M parameters, cross-attention at 4 x 4; epsilon, scaled_linear betas, trailing timesteps. fp16 safetensors.

Made by `python pipelines/train_teacher.py OUTPUT` from {images:,} renderings, seed {seed}: VAE {vae_steps:,} steps of
32, U-Net and text encoder {unet_steps:,} steps of 64 with EMA, captions dropped at 10 %. The images are drawn with the
typefaces that matplotlib ships (DejaVu, STIX, Computer Modern).
""",
    "pairs": """---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, stable-diffusion-xl, tiny]
---
# The pairs teacher

A complete, very small pipeline of SDXL's classes, trained from nothing: 48 x 48 pictures of two capital letters, each in its
own ink, for captions such as "a red letter a left of a blue letter k on gray" (26 letters; 5 inks; left of, above; 4
papers: 135,200 captions, of which it saw {images:,}). Typefaces, angles, sizes and places are its own choice. It exists
to be distilled; sample it with guidance 3.

AutoencoderKL (24, 48, 48) with 4 x 12 x 12 latents; two CLIP text encoders of width 64 with 3 layers; UNet2DConditionModel
({widths}), {parameters:.1f} M parameters, cross-attention at 6 x 6; v-prediction, scaled_linear betas, trailing timesteps.
fp16 safetensors.

Made by `python pipelines/train_teacher.py OUTPUT --world pairs` from {images:,} renderings, seed {seed}: VAE
{vae_steps:,} steps of 32, U-Net and text encoders {unet_steps:,} steps of 64 with EMA, captions dropped at 10 %. The images
are drawn with the typefaces that matplotlib ships (DejaVu, STIX, Computer Modern).
""",
}


def train_world(world: str, training: Training, output: Path) -> None:
    """Writes output/reader and output/teacher, a pipeline's folder in float16."""
    pipeline: Any = {"letters": _letters, "pairs": _pairs}[world](training, output)
    pipeline.to(torch.float16).save_pretrained(output / "teacher", safe_serialization=True)
    facts = vars(training) | {"widths": ", ".join(map(str, training.widths))}
    card = _CARDS[world].format(parameters=pipeline.unet.num_parameters() / 1e6, **facts)
    (output / "teacher" / "README.md").write_text(card)


def _reader(training: Training, output: Path, images: Any, labels: Any, questions: Questions) -> Reader:
    """The reader, trained and saved."""
    reader = recipe.train_reader(
        images, labels, steps=training.reader_steps, seed=training.seed, questions=questions
    )
    save_reader(reader, output / "reader" / "model.fp16.safetensors")
    return reader


@torch.no_grad()
def _check(reader: Reader, vae: Any, fresh: torch.Tensor, labels: torch.Tensor) -> None:
    """Logs how many new renderings the reader names, and how many of what the VAE makes of them."""
    truth = [reader.questions.content(*row) for row in labels.tolist()]
    decoded = vae.decode(recipe.encode_images(vae, fresh, scaling_factor=1.0)).sample
    reconstructions = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for name, batch in (("new renderings", fresh), ("their reconstructions", reconstructions)):
        right = sum(a == b for a, b in zip(reader.read(batch), truth, strict=True))
        logger.info("the reader names %.1f %% of %s", 100 * right / len(truth), name)


def _letters(training: Training, output: Path) -> DiffusionPipeline:
    """The reader and the pipeline of the letters world."""
    images, labels = recipe.rendered_batch(training.images, seed=training.seed)
    reader = _reader(training, output, images, labels, OF_LETTERS)
    vae = recipe.train_vae(images, steps=training.vae_steps, seed=training.seed)
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)
    _check(reader, vae, *recipe.rendered_batch(1000, seed=training.seed + 1))
    tokenizer = recipe.build_tokenizer()
    unet, text_encoder = recipe.train_unet(
        latents,
        [Triple(*row).caption for row in labels.tolist()],
        tokenizer,
        steps=training.unet_steps,
        seed=training.seed,
        widths=training.widths,
        device=training.device,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=recipe.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _pairs(training: Training, output: Path) -> DiffusionPipeline:
    """The reader and the pipeline of the pairs world."""
    images, labels = pairs_teacher.rendered_batch(training.images, seed=training.seed)
    reader = _reader(training, output, images, labels, OF_PAIRS)
    vae = recipe.train_vae(images, steps=training.vae_steps, seed=training.seed)
    _check(reader, vae, *pairs_teacher.rendered_batch(1000, seed=training.seed + 1))
    return pairs_teacher.train_pipeline(
        vae,
        images,
        [Pair(*row).caption for row in labels.tolist()],
        unet_steps=training.unet_steps,
        seed=training.seed,
        widths=training.widths,
        device=training.device,
    )
