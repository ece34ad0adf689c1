"""A second reader of the letters, trained on other renderings than the shipped one: does it order the methods alike?

    python eval/second_reader.py [--steps 2400] [--num-images 30000] [--seed 7] [--output eval/assets/second_reader]

The shipped reader, which FID and prompt accuracy are measured with, has seen the typefaces, angles and sizes that the
teacher was trained on. This one is the same kind of net from another seed. It has seen every other typeface alone, turned
further either way, in a wider range of sizes and further off the middle. Its weights are OUTPUT.fp16.safetensors.
OUTPUT.json says what it was trained on, its hash, and how many renderings it reads right that it has not seen.
side_by_side.py measures each row with it as well, and orders.py says where the two readers disagree.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from stepdistill.config import RunConfig
from stepdistill.demo.letters import TYPEFACES, WORLD, Style, Triple
from stepdistill.demo.reader import Reader, load_reader, save_reader
from stepdistill.demo.teacher import rendered_batch, train_reader
from stepdistill.durable import sha256_file
from stepdistill.evaluation.distances import fid
from stepdistill.evaluation.features import ReaderFeatures
from stepdistill.evaluation.measure import ImageSet, View
from stepdistill.evaluation.metrics import prompt_accuracy
from stepdistill.evaluation.pictures import PictureFolder
from stepdistill.evaluation.subject import RealImages, subject_of
from stepdistill.models.folder import embedded_folder
from stepdistill.runtime import environment, source_commit

ASSET = Path(__file__).parent / "assets" / "second_reader"
SEEN = Style(typefaces=TYPEFACES[::2], angle=0.35, cap_height=(0.5, 0.8), shift=0.09)
TESTED = {
    "its own kind of renderings": SEEN,
    "the world's renderings": WORLD,
    "the world's renderings in typefaces that it has not seen": Style(typefaces=TYPEFACES[1::2]),
}
TEST_IMAGES = 2080  # each caption four times
PREFIX = "second_"


def weights_of(asset: Path) -> Path:
    """The safetensors file beside asset.json."""
    return asset.with_suffix(".fp16.safetensors")


def measured_again(
    config: RunConfig, rows: Iterable[str], *, asset: Path = ASSET
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What the second reader makes of a finished table of letters: for each row second_fid_to_real, second_prompt_accuracy
    and, where the teacher's images of other seeds are drawn, second_fid_to_teacher; and the floor, of two sets of real
    images. Nothing for a table that is not about letters.

    Args:
        config: the table's own; its rows are drawn in run_dir/evaluation.
        rows: their names.
        asset: where the reader is, without suffix.
    """
    subject, folder = subject_of(config), config.run_dir / "evaluation"
    if subject.wanted is None:
        return {}, {}
    extractor = ReaderFeatures(weights_of(asset)).eval().requires_grad_(False)
    view = View("second", extractor, config.evaluation.resize or extractor.default_resize)

    def drawn(row: str) -> ImageSet:
        pictures, count = PictureFolder(folder / row), config.evaluation.num_images
        return ImageSet(str(pictures.key), pictures.path / "features", lambda: pictures.batches(count))

    def undrawn(images: RealImages | None, name: str) -> ImageSet | None:
        return images and ImageSet(images.key, folder / "features" / name, images.batches)

    def distances(images: ImageSet, references: dict[str, ImageSet | None]) -> dict[str, float]:
        return {
            f"{PREFIX}fid_to_{name}": fid(view.features(reference), view.features(images))
            for name, reference in references.items()
            if reference is not None
        }

    real, other_real = undrawn(subject.real, "real"), undrawn(subject.other_real, "other-real")
    references = {"real": real, "teacher": drawn("floor") if config.evaluation.floor else None}
    measures = {}
    for row in rows:
        images = drawn(row)
        accuracy = prompt_accuracy(images.batches(), subject.wanted, reader=extractor.reader)
        measures[row] = distances(images, references) | {f"{PREFIX}prompt_accuracy": accuracy}
    return measures, {} if other_real is None else distances(other_real, {"real": real})


def accuracies(reader: Reader, *, seed: int, num_images: int = TEST_IMAGES) -> dict[str, float]:
    """The shares of new renderings of each kind that it reads right."""
    shares = {}
    for name, style in TESTED.items():
        images, labels = rendered_batch(num_images, seed=seed, style=style)
        shares[name] = prompt_accuracy([images], [Triple(*row) for row in labels.tolist()], reader=reader)
    return shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the second reader of the letters.")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--num-images", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ASSET)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at = source_commit()
    images, labels = rendered_batch(args.num_images, seed=args.seed, style=SEEN)
    save_reader(train_reader(images, labels, steps=args.steps, seed=args.seed), weights_of(args.output))
    reader = load_reader(weights_of(args.output))  # as it is kept, in float16
    shipped = load_reader(embedded_folder("reader") / "model.fp16.safetensors")
    record = {
        "command": f"python eval/second_reader.py --steps {args.steps} --num-images {args.num_images} --seed {args.seed}",
        "commit": made_at,
        "sha256": sha256_file(weights_of(args.output)),
        "trained_on": asdict(SEEN),
        "accuracy": accuracies(reader, seed=args.seed + 1),
        "accuracy_of_the_shipped_reader": accuracies(shipped, seed=args.seed + 1),
        "environment": environment(),
    }
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    for name, share in record["accuracy"].items():
        print(
            f"it reads {share:.1%} of {name}; the shipped reader {record['accuracy_of_the_shipped_reader'][name]:.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
