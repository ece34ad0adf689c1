"""Makes the embedded teacher and reader anew from a fixed seed: reader, VAE, then U-Net with its text encoder.

python pipelines/train_teacher.py OUTPUT_FOLDER [--seed 0]      about 40 minutes on 4 cores
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded letters teacher and reader.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader-steps", type=int, default=1800)
    parser.add_argument("--vae-steps", type=int, default=2200)
    parser.add_argument("--unet-steps", type=int, default=5000)
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
    for name, pictures in (("new renderings", fresh), ("their reconstructions", reconstructions)):
        right = sum(a == b for a, b in zip(reader.read(pictures), truth, strict=True))
        logging.info("the reader names %.1f %% of %s", 100 * right / len(truth), name)

    tokenizer = recipe.build_tokenizer()
    unet, text_encoder = recipe.train_unet(latents, labels, tokenizer, steps=args.unet_steps, seed=args.seed)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
