"""Trains a second reader of the letters on other renderings, to check whether both readers order the methods alike.

    python eval/second_reader.py [--steps 2400] [--num-images 30000] [--seed 7] [--output eval/assets/second_reader]

The shipped reader, which measures FID and prompt accuracy, was trained on the typefaces, angles and sizes that the teacher
was trained on. The second reader is the same kind of net, trained from another seed on every other typeface only, with wider
ranges of angles, sizes and positions. Its weights are OUTPUT.fp16.safetensors. OUTPUT.json records what it was trained on,
its hash, and the share of new renderings that it reads right. side_by_side.py measures each row with this reader as well,
and orders.py reports where the two readers disagree.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from stepdistill.config import RunConfig
from stepdistill.demo.letters import TYPEFACES, WORLD, Style, Triple, parse_caption
from stepdistill.demo.reader import Reader, load_reader, prompt_accuracy, save_reader, shipped_reader
from stepdistill.demo.teacher import rendered_batch, train_reader
from stepdistill.disk.durable import sha256_file
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.evaluation_set import RealImages, evaluation_set_of
from stepdistill.evaluation.measure.distances import fid, fid_without_each_group
from stepdistill.evaluation.measure.features import ReaderFeatures
from stepdistill.evaluation.measure.image_sets import ImageSet, View
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
    """The weights file of a reader: `asset` with the suffix .fp16.safetensors."""
    return asset.with_suffix(".fp16.safetensors")


@dataclass(frozen=True)
class Again:
    """The second reader's measures of a table of letters. All empty if the table is about other images.

    rows        by row: second_fid_to_real, second_prompt_accuracy and, if the teacher's images from other seeds were drawn,
                second_fid_to_teacher
    floor       second_fid_to_real of two sets of real images
    replicates  by row and measure: the jackknife's replicates (stepdistill/jackknife.py) of these measures and of the
                shipped reader's prompt_accuracy
    """

    rows: dict[str, dict[str, float]]
    floor: dict[str, float]
    replicates: dict[str, dict[str, list[float]]]


def measured_again(config: RunConfig, rows: Iterable[str], *, asset: Path = ASSET) -> Again:
    """Measures a finished table's images with the second reader.

    Args:
        config: the table's config; the images of its rows are in run_dir/evaluation.
        rows: names of the rows.
        asset: path of the second reader, without suffix.
    """
    evaluation_set, folder = evaluation_set_of(config), config.run_dir / "evaluation"
    if evaluation_set.world is None or evaluation_set.world.name != "letters":
        return Again({}, {}, {})
    extractor = ReaderFeatures(weights_of(asset)).eval().requires_grad_(False)
    shipped = shipped_reader()
    triples = [parse_caption(prompt) for prompt in evaluation_set.prompts]
    view = View("second", extractor, config.evaluation.resize or extractor.default_resize)

    def drawn(row: str) -> ImageSet:
        drawn_images, count = RowImages(folder / row), config.evaluation.num_images
        return ImageSet(
            str(drawn_images.key), drawn_images.path / "features", lambda: drawn_images.batches(count)
        )

    def features(images: RealImages | None, name: str) -> torch.Tensor | None:
        return images and view.features(ImageSet(images.key, folder / "features" / name, images.batches))

    real, other_real = (
        features(evaluation_set.real, "real"),
        features(evaluation_set.other_real, "other-real"),
    )
    references = {} if real is None else {f"{PREFIX}fid_to_real": real}
    floor = {
        key: fid(reference, other_real) for key, reference in references.items() if other_real is not None
    }
    if config.evaluation.floor:
        references[f"{PREFIX}fid_to_teacher"] = view.features(drawn("floor"))
    measures, replicates = {}, {}
    for row in rows:
        images = drawn(row)
        row_features = view.features(images)
        right = {
            f"{prefix}prompt_accuracy": _right(images, reader, triples)
            for prefix, reader in (("", shipped), (PREFIX, extractor.reader))
        }
        measures[row] = {key: fid(reference, row_features) for key, reference in references.items()}
        measures[row][f"{PREFIX}prompt_accuracy"] = right[f"{PREFIX}prompt_accuracy"].mean().item()
        replicates[row] = {
            key: fid_without_each_group(row_features, reference) for key, reference in references.items()
        } | {key: _share_without_each_group(answers) for key, answers in right.items()}
    return Again(measures, floor, replicates)


def _right(images: ImageSet, reader: Reader, triples: Sequence[Triple]) -> torch.Tensor:
    """For each image (N,): 1 if letter, ink and paper are those of the prompt, else 0."""
    answers = [answer for batch in images.batches() for answer in reader.read(batch)]
    return torch.tensor([float(a == b) for a, b in zip(answers, triples, strict=True)], dtype=torch.float64)


def _share_without_each_group(right: torch.Tensor, *, groups: int = 8) -> list[float]:
    """For each group of FID's jackknife (every `groups`-th value): the mean of `right` (N,) without that group."""
    groups = min(groups, len(right) // 2)
    group_of = torch.arange(len(right)) % groups
    return [right[group_of != group].mean().item() for group in range(groups)]


def accuracies(reader: Reader, *, seed: int, num_images: int = TEST_IMAGES) -> dict[str, float]:
    """By kind of rendering (TESTED): the share of new renderings that the reader reads right."""
    shares = {}
    for name, style in TESTED.items():
        images, labels = rendered_batch(num_images, seed=seed, style=style)
        shares[name] = prompt_accuracy([images], [Triple(*row) for row in labels.tolist()], reader=reader)
    return shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains the second reader of the letters.")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--num-images", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ASSET)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at = source_commit()
    images, labels = rendered_batch(args.num_images, seed=args.seed, style=SEEN)
    save_reader(train_reader(images, labels, steps=args.steps, seed=args.seed), weights_of(args.output))
    reader = load_reader(weights_of(args.output))  # the stored weights, in float16
    shipped = shipped_reader()
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
