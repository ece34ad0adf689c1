"""Trains the teacher and the reader of an embedded world again from a fixed seed: reader, VAE, U-Net with text encoders.

python pipelines/train_teacher.py OUTPUT_FOLDER [--world letters] [--seed 0]   letters: half an hour on 4 cores; pairs: one
    [--widths 192 384 --unet-steps 20000 --device cuda]         a larger U-Net, for eval/compare_peers.py --size gpu
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from stepdistill.demo import pairs_teacher
from stepdistill.demo import teacher as recipe
from stepdistill.demo.letters import Triple
from stepdistill.demo.pairs import Pair
from stepdistill.demo.reader import OF_LETTERS, OF_PAIRS, Questions, Reader, save_reader

NUM_IMAGES = {"letters": 30_000, "pairs": 40_000}
STEPS = {"letters": (1800, 2200, 5000), "pairs": (3000, 1800, 5000)}
"""Of reader, VAE and U-Net, where the command line has no others."""
CARDS = {
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

Made by `python pipelines/train_teacher.py OUTPUT` from {num_images:,} renderings, seed {seed}: VAE {vae_steps:,} steps of
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
papers: 135,200 captions, of which it saw three tenths). Typefaces, angles, sizes and places are its own choice. It exists
to be distilled; sample it with guidance 3.

AutoencoderKL (24, 48, 48) with 4 x 12 x 12 latents; two CLIP text encoders of width 64 with 3 layers; UNet2DConditionModel
({widths}), {parameters:.1f} M parameters, cross-attention at 6 x 6; v-prediction, scaled_linear betas, trailing timesteps.
fp16 safetensors.

Made by `python pipelines/train_teacher.py OUTPUT --world pairs` from {num_images:,} renderings, seed {seed}: VAE
{vae_steps:,} steps of 32, U-Net and text encoders {unet_steps:,} steps of 64 with EMA, captions dropped at 10 %. The images
are drawn with the typefaces that matplotlib ships (DejaVu, STIX, Computer Modern).
""",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the teacher and the reader of an embedded world.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--world", choices=sorted(STEPS), default="letters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="renderings to learn from")
    parser.add_argument("--reader-steps", type=int)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--unet-steps", type=int)
    parser.add_argument("--widths", nargs=2, type=int, default=list(recipe.WIDTHS))
    parser.add_argument("--device", default="cpu", help="where the U-Net is trained")
    args = parser.parse_args(argv)
    defaults = dict(zip(("reader_steps", "vae_steps", "unet_steps"), STEPS[args.world], strict=True))
    for name, value in (defaults | {"images": NUM_IMAGES[args.world]}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def trained_reader(args: argparse.Namespace, images: Any, labels: Any, questions: Questions) -> Reader:
    """The reader, trained and saved."""
    reader = recipe.train_reader(images, labels, steps=args.reader_steps, seed=args.seed, questions=questions)
    save_reader(reader, args.output / "reader" / "model.fp16.safetensors")
    return reader


@torch.no_grad()
def check_reader(reader: Reader, vae: Any, fresh: torch.Tensor, labels: torch.Tensor) -> None:
    """Logs how many new renderings the reader names, and how many of what the VAE makes of them."""
    truth = [reader.questions.content(*row) for row in labels.tolist()]
    decoded = vae.decode(recipe.encode_images(vae, fresh, scaling_factor=1.0)).sample
    reconstructions = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for name, batch in (("new renderings", fresh), ("their reconstructions", reconstructions)):
        right = sum(a == b for a, b in zip(reader.read(batch), truth, strict=True))
        logging.info("the reader names %.1f %% of %s", 100 * right / len(truth), name)


def letters_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The reader and the pipeline of the letters world."""
    images, labels = recipe.rendered_batch(args.images, seed=args.seed)
    reader = trained_reader(args, images, labels, OF_LETTERS)
    vae = recipe.train_vae(images, steps=args.vae_steps, seed=args.seed)
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)
    check_reader(reader, vae, *recipe.rendered_batch(1000, seed=args.seed + 1))
    tokenizer = recipe.build_tokenizer()
    unet, text_encoder = recipe.train_unet(
        latents,
        [Triple(*row).caption for row in labels.tolist()],
        tokenizer,
        steps=args.unet_steps,
        seed=args.seed,
        widths=tuple(args.widths),
        device=args.device,
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


def pairs_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The reader and the pipeline of the pairs world."""
    images, labels = pairs_teacher.rendered_batch(args.images, seed=args.seed)
    reader = trained_reader(args, images, labels, OF_PAIRS)
    pipeline = pairs_teacher.train_pipeline(
        images,
        [Pair(*row).caption for row in labels.tolist()],
        vae_steps=args.vae_steps,
        unet_steps=args.unet_steps,
        seed=args.seed,
        widths=tuple(args.widths),
        device=args.device,
    )
    check_reader(reader, pipeline.vae, *pairs_teacher.rendered_batch(1000, seed=args.seed + 1))
    return pipeline


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipeline: Any = {"letters": letters_pipeline, "pairs": pairs_pipeline}[args.world](args)
    pipeline.to(torch.float16).save_pretrained(args.output / "teacher", safe_serialization=True)
    facts = {"seed": args.seed, "vae_steps": args.vae_steps, "unet_steps": args.unet_steps}
    facts |= {"widths": ", ".join(map(str, args.widths)), "parameters": pipeline.unet.num_parameters() / 1e6}
    card = CARDS[args.world].format(num_images=args.images, **facts)
    (args.output / "teacher" / "README.md").write_text(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
