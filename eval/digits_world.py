"""A world for compare_peers.py that nothing was tuned on: coloured handwritten digits, and a teacher trained on them.

    pip install "stepdistill[worlds]"
    python eval/digits_world.py OUTPUT [--unet-steps 3000] [--seed 0]
    python eval/compare_peers.py --tune --output OUTPUT/peers --output-dir OUTPUT/runs teacher.path=OUTPUT/teacher
        data.source=OUTPUT/pictures evaluation.features=reader

Each of scikit-learn's 1,797 handwritten digits (8 x 8, Alpaydin and Kaynak 1998) is drawn four times in random ink and paper
colours, slightly rotated and shifted. OUTPUT/pictures has 32 x 32 PNGs with captions such as "a red 3 on yellow". The
teacher is trained as the letters teacher is, with the VAE of the letters teacher.
"""

import argparse
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stepdistill.config import Data
from stepdistill.data.source import evaluation_images
from stepdistill.demo import teacher as recipe
from stepdistill.demo.letters import INKS, PAPERS
from stepdistill.teacher.folder import embedded_folder
from stepdistill.teacher.loading import load_pipeline, load_vae

COPIES = 4


def draw_digit(strokes: np.ndarray, ink: str, paper: str, generator: np.random.Generator) -> Image.Image:
    """A 32 x 32 image of a digit, rotated by up to 12 degrees and shifted by up to 2 pixels.

    strokes: (8, 8), values from 0 to 16.
    """
    gray = Image.fromarray((strokes * (255 / 16)).astype(np.uint8)).resize((26, 26), Image.Resampling.BICUBIC)
    sheet = Image.new("L", (32, 32))
    sheet.paste(gray, tuple(3 + generator.integers(-2, 3, 2)))
    turned = sheet.rotate(float(generator.uniform(-12, 12)), Image.Resampling.BICUBIC)
    return Image.composite(
        Image.new("RGB", (32, 32), INKS[ink]), Image.new("RGB", (32, 32), PAPERS[paper]), turned
    )


def write_images(folder: Path, *, seed: int) -> None:
    """Writes every digit COPIES times, with its captions."""
    from sklearn.datasets import load_digits  # optional: main names it if it is missing

    folder.mkdir(parents=True, exist_ok=True)
    data, generator = load_digits(), np.random.default_rng(seed)
    for copy in range(COPIES):
        for k, (strokes, digit) in enumerate(zip(data.images, data.target, strict=True)):
            ink, paper = generator.choice(list(INKS)), generator.choice(list(PAPERS))
            name = f"{copy}-{k:04d}"
            draw_digit(strokes, ink, paper, generator).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"a {ink} {digit} on {paper}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a world of handwritten digits and its teacher.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unet-steps", type=int, default=3000)
    args = parser.parse_args(argv)
    if find_spec("sklearn") is None:
        parser.error('scikit-learn is not installed; fix: pip install "stepdistill[worlds]"')
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_images(args.output / "pictures", seed=args.seed)
    captioned = evaluation_images(Data(source=str(args.output / "pictures")))
    images = torch.from_numpy(np.stack([image.pixels((32, 32)) for image in captioned])).permute(0, 3, 1, 2)
    vae = load_vae(embedded_folder("teacher"))
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)
    tokenizer = recipe.build_tokenizer()
    captions = [image.caption for image in captioned]
    unet, text_encoder = recipe.train_unet(
        latents, captions, tokenizer, steps=args.unet_steps, seed=args.seed
    )
    pipeline = load_pipeline(embedded_folder("teacher"))
    pipeline.register_modules(unet=unet, text_encoder=text_encoder)
    pipeline.save_pretrained(args.output / "teacher", safe_serialization=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
