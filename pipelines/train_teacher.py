"""Trains the teacher and the reader of a world of rendered images from a fixed seed: reader, VAE, U-Net with text encoders.

python pipelines/train_teacher.py OUTPUT_FOLDER [--world letters] [--seed 0]      half an hour on 4 cores; pairs: an hour
    [--family sd3]                                              of the letters, with the classes of SD3
    [--widths 192 384 --unet-steps 20000 --device cuda]         a larger U-Net, for eval/compare_peers.py --size gpu
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from stepdistill.config.data import WORLDS
from stepdistill.demo.train import RECIPES, train_world


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train the teacher and the reader of a world of rendered images."
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="letters")
    parser.add_argument(
        "--family", choices=("sd3",), help="of the letters' teacher; default: Stable Diffusion"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--images", type=int, help="renderings to learn from")
    parser.add_argument("--reader-steps", type=int)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--unet-steps", type=int)
    parser.add_argument("--widths", nargs=2, type=int)
    parser.add_argument("--device", help="where the U-Net is trained")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = args.world if args.family is None else f"{args.world}_{args.family}"
    if name not in RECIPES:
        parser.error(f"--family: got {args.family} with --world {args.world}; allowed: only with letters")
    names = (field.name for field in dataclasses.fields(RECIPES[name]))
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.widths is not None:
        given["widths"] = tuple(args.widths)
    train_world(name, dataclasses.replace(RECIPES[name], **given), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
