"""Trains the teachers of the worlds of rendered images, and the readers of these worlds, that the package ships."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline

from stepdistill.demo import flow_teacher, pairs_teacher
from stepdistill.demo import teacher as recipe
from stepdistill.demo.letters import Triple
from stepdistill.demo.pairs import Pair
from stepdistill.demo.reader import OF_LETTERS, OF_PAIRS, Questions, Reader, save_reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How much is trained.

    images                                renderings to learn from
    reader_steps, vae_steps, unet_steps   updates; 0 for a reader or VAE that is shipped already; the last are those of the
                                          network, also if it is a transformer
    unet_decay_steps                      updates over which the network's learning rate decays; None: all of them. A longer
                                          decay is stopped on the way
    widths                                of the U-Net's two levels
    device                                where the network is trained
    """

    images: int
    reader_steps: int
    vae_steps: int
    unet_steps: int
    unet_decay_steps: int | None = None
    widths: tuple[int, int] = recipe.WIDTHS
    device: str = "cpu"
    seed: int = 0


RECIPES = {
    "letters": Training(30_000, reader_steps=1800, vae_steps=2200, unet_steps=5000),
    "letters_sd3": Training(30_000, reader_steps=0, vae_steps=0, unet_steps=6000),
    "pairs": Training(
        40_000,
        reader_steps=3000,
        vae_steps=1800,
        # of 5,000, after which the teacher draws every prompt right, and students could not be told apart by that
        unet_steps=2000,
        unet_decay_steps=5000,
        widths=pairs_teacher.WIDTHS,
    ),
}
"""How the reader and the teacher of each world are trained; a family's name follows that of the world."""
_SHIPPED_TEACHER = Path(__file__).parent / "assets" / "teacher"
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
    "letters_sd3": """---
license: apache-2.0
library_name: diffusers
tags: [text-to-image, stable-diffusion-3, tiny]
---
# The letters teacher of SD3's classes

A complete, very small StableDiffusion3Pipeline, trained from nothing to match flows: 32 x 32 capital letters of 22 real
typefaces in colour, for captions such as "a purple letter m on pink" (26 letters; red, green, blue, black, purple ink;
white, yellow, pink, gray paper). It exists to be distilled; sample it with guidance 3 and max_sequence_length 10.

The VAE of the other letters teacher, with 4 x 8 x 8 latents; SD3Transformer2DModel with 5 blocks of width 96 over patches
of 2 x 2, {parameters:.1f} M parameters; two CLIPs of width 64 and a T5 of width 128; shift 1. fp16 safetensors.

Made by `python pipelines/train_teacher.py OUTPUT --family sd3` from {images:,} renderings, seed {seed}: {unet_steps:,}
steps of 64 with EMA, captions dropped at 10 %. The images are drawn with the typefaces that matplotlib ships (DejaVu, STIX,
Computer Modern).
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
to be distilled; sample it with guidance 3. Its training was stopped while it still drew some prompts wrong, so that what
its students lose can be seen.

AutoencoderKL (24, 48, 48) with 4 x 12 x 12 latents; two CLIP text encoders of width 64 with 3 layers; UNet2DConditionModel
({widths}), {parameters:.1f} M parameters, cross-attention at 6 x 6; v-prediction, scaled_linear betas, trailing timesteps.
fp16 safetensors.

Made by `python pipelines/train_teacher.py OUTPUT --world pairs` from {images:,} renderings, seed {seed}: VAE
{vae_steps:,} steps of 32, U-Net and text encoders {unet_steps:,} of {unet_decay_steps:,} steps of 32 with EMA, captions
dropped at 10 %. The images are drawn with the typefaces that matplotlib ships (DejaVu, STIX, Computer Modern).
""",
}


def train_world(name: str, training: Training, output: Path) -> None:
    """Writes output/reader, unless the world has one already, and output/teacher, a pipeline's folder in float16; the names
    are those of RECIPES."""
    train = {"letters": _letters, "letters_sd3": _letters_sd3, "pairs": _pairs}[name]
    pipeline: Any = train(training, output)
    pipeline.to(torch.float16).save_pretrained(output / "teacher", safe_serialization=True)
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    facts = vars(training) | {"widths": ", ".join(map(str, training.widths))}
    card = _CARDS[name].format(parameters=network.num_parameters() / 1e6, **facts)
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


def _letters_sd3(training: Training, _output: Path) -> DiffusionPipeline:
    """The pipeline of SD3's classes for the letters world, with the VAE of the shipped teacher."""
    images, labels = recipe.rendered_batch(training.images, seed=training.seed)
    vae = AutoencoderKL.from_pretrained(_SHIPPED_TEACHER, subfolder="vae", dtype=torch.float32)
    return flow_teacher.train_pipeline(
        vae.eval().requires_grad_(False),
        images,
        [Triple(*row).caption for row in labels.tolist()],
        updates=recipe.Updates(training.unet_steps, training.seed),
        device=training.device,
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
        updates=recipe.Updates(training.unet_steps, training.seed, 32, training.unet_decay_steps),
        widths=training.widths,
        device=training.device,
    )
