"""Trains the demo's teacher and reader again from a fixed seed: reader, VAE, then U-Net with its text encoder.

python pipelines/train_teacher.py OUTPUT_FOLDER [--seed 0]      half an hour on 4 cores
    [--widths 192 384 --unet-steps 20000 --device cuda]         a larger U-Net, for eval/compare_peers.py --size gpu
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from stepdistill.demo import teacher as recipe
from stepdistill.demo.letters import Triple
from stepdistill.demo.reader import save_reader

NUM_IMAGES = 30_000
CARD = """---
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
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded letters teacher and reader.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader-steps", type=int, default=1800)
    parser.add_argument("--vae-steps", type=int, default=2200)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--widths", nargs=2, type=int, default=list(recipe.WIDTHS))
    parser.add_argument("--device", default="cpu", help="where the U-Net is trained")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, labels = recipe.rendered_batch(NUM_IMAGES, seed=args.seed)

    reader = recipe.train_reader(images, labels, steps=args.reader_steps, seed=args.seed)
    save_reader(reader, args.output / "reader" / "model.fp16.safetensors")

    vae = recipe.train_vae(images, steps=args.vae_steps, seed=args.seed)
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)

    fresh, fresh_labels = recipe.rendered_batch(1000, seed=args.seed + 1)
    truth = [Triple(*row) for row in fresh_labels.tolist()]
    decoded = vae.decode(recipe.encode_images(vae, fresh, scaling_factor=1.0)).sample
    reconstructions = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for name, batch in (("new renderings", fresh), ("their reconstructions", reconstructions)):
        right = sum(a == b for a, b in zip(reader.read(batch), truth, strict=True))
        logging.info("the reader names %.1f %% of %s", 100 * right / len(truth), name)

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
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=recipe.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.output / "teacher", safe_serialization=True)
    facts = {"seed": args.seed, "vae_steps": args.vae_steps, "unet_steps": args.unet_steps}
    facts |= {"widths": ", ".join(map(str, args.widths)), "parameters": unet.num_parameters() / 1e6}
    (args.output / "teacher" / "README.md").write_text(CARD.format(num_images=NUM_IMAGES, **facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
