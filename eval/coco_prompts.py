"""A fixed subset of COCO 2014 as a prompt file and a folder of real images: N images, one caption of each.

    python eval/coco_prompts.py captions_val2014.json val2014/ --num-images 10000 --output coco10k

Writes OUTPUT/prompts.txt (one caption per line) and OUTPUT/images/ (symbolic links to the images of these captions). The
subset consists of the first N images in the order of sha256(seed, id), each with its caption of the lowest id.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path


def subset(annotations: dict, *, num_images: int, seed: int) -> list[tuple[str, str]]:
    """(file name, caption) of `num_images` images. ValueError if fewer images have captions."""
    captions: dict[int, tuple[int, str]] = {}
    for entry in annotations["annotations"]:
        candidate = (entry["id"], " ".join(entry["caption"].split()))
        captions[entry["image_id"]] = min(captions.get(entry["image_id"], candidate), candidate)
    names = {image["id"]: image["file_name"] for image in annotations["images"] if image["id"] in captions}
    if len(names) < num_images:
        raise ValueError(
            f"--num-images: got {num_images}; allowed: up to {len(names)}, the images with captions"
        )
    order = sorted(names, key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).hexdigest())
    return [(names[number], captions[number][1]) for number in order[:num_images]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes prompts and real images of COCO 2014.")
    parser.add_argument("captions", type=Path, help="captions_val2014.json")
    parser.add_argument("images", type=Path, help="the folder with val2014's images")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        annotations = json.loads(args.captions.read_text(encoding="utf-8"))
        chosen = subset(annotations, num_images=args.num_images, seed=args.seed)
    except (OSError, KeyError, ValueError) as error:
        print(f"coco_prompts: {error}", file=sys.stderr)
        return 2
    missing = [name for name, _ in chosen if not (args.images / name).is_file()]
    if missing:
        print(
            f"coco_prompts: {args.images} lacks {len(missing)} images, such as {missing[0]}",
            file=sys.stderr,
        )
        return 2
    links = args.output / "images"
    links.mkdir(parents=True, exist_ok=True)
    for name, _ in chosen:
        link = links / name
        link.unlink(missing_ok=True)
        link.symlink_to((args.images / name).resolve())
    (args.output / "prompts.txt").write_text("".join(f"{text}\n" for _, text in chosen), encoding="utf-8")
    print(f"{len(chosen)} prompts in {args.output / 'prompts.txt'}, their images in {links}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
