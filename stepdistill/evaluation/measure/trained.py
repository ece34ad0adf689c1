"""`evaluation.features: trained`: a small net (small_net.py) that is trained once on the run's training images.

RUN/evaluation/extractor/model.safetensors   the net
RUN/evaluation/extractor/extractor.json      key of what it depends on, sha256, training settings, accuracy; written last
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stepdistill.config import Data, RunConfig
from stepdistill.data.decode import BadSample, cover
from stepdistill.data.file_version import version_of_file
from stepdistill.data.held_out import source_data
from stepdistill.data.records import Record, is_cache, is_prompts_only
from stepdistill.data.size_counts import data_seed
from stepdistill.data.source import image_of, training_records
from stepdistill.demo.world import world_of
from stepdistill.disk.durable import read_sealed, sha256_json, warn_of_damage
from stepdistill.evaluation.evaluation_set import ImageFolder, read_rgb
from stepdistill.evaluation.measure.resize import resize
from stepdistill.evaluation.measure.small_net import (
    RECORD,
    WEIGHTS,
    TrainingSettings,
    read_small_net,
    side_for,
    train_small_net,
    write_small_net,
)
from stepdistill.run.log import PhaseProgress
from stepdistill.teacher.source import teacher_facts

logger = logging.getLogger(__name__)
MIN_NET_IMAGES = 200
MAX_NET_IMAGES = 4096
"""Most images that the net is trained on and validated with."""
RESIZE = "pil_bicubic"
_APART = 10  # every tenth image is used for validation
_FORM = 1  # version of this file's method; raise it so that nets of earlier versions are trained again


@dataclasses.dataclass(frozen=True)
class _TrainingImage:
    """One image, not read yet.

    name, version  identify the image
    pixels         returns uint8 (H, W, 3) cropped to a size (H, W); may raise BadSample
    """

    name: str
    version: Callable[[], str]
    pixels: Callable[[tuple[int, int]], np.ndarray]


Size = tuple[int, int]


def images_at_hand(config: RunConfig) -> int:
    """Number of images that the net could be trained on, counted up to MIN_NET_IMAGES."""
    return sum(1 for _ in itertools.islice(_images(config), MIN_NET_IMAGES))


def trained_side(config: RunConfig) -> int:
    """The side in pixels that the net takes."""
    return side_for(teacher_facts(config).image_size)


def trained_extractor(config: RunConfig) -> Path:
    """The folder of the run's extractor, which is trained if it is missing or its images or settings changed."""
    folder = config.run_dir / "evaluation" / "extractor"
    chosen = list(itertools.islice(_images(config), MAX_NET_IMAGES))
    size, settings = teacher_facts(config).image_size, TrainingSettings()
    how, side = config.evaluation.resize or RESIZE, trained_side(config)
    versions = [[image.name, image.version()] for image in chosen]
    drawn_by = [config.seed, config.data.num_images] if world_of(config.data.source) is not None else None
    key = sha256_json([_FORM, versions, drawn_by, size, how, dataclasses.asdict(settings)])
    record = read_sealed(folder / RECORD)
    if record is not None and record.get("key") == key:
        with contextlib.suppress(ValueError):
            read_small_net(folder)
            return folder
        warn_of_damage(folder / WEIGHTS, "the extractor is trained again")
    elif record is None and (folder / RECORD).exists():
        warn_of_damage(folder / RECORD, "the extractor is trained again")
    logger.info(
        "evaluate: training a feature extractor on %d images, to be stored in %s", len(chosen), folder
    )
    pixels = torch.cat(list(_resized(chosen, size, how, side)))
    apart = torch.arange(len(pixels)) % _APART == 0
    with PhaseProgress("extractor", settings.steps, logging_steps=100, enabled=True) as bar:
        net, accuracy = train_small_net(
            pixels[~apart], pixels[apart], settings, lambda step, loss: bar.update(step, {"loss": loss})
        )
    about = {
        "key": key,
        "pictures": int((~apart).sum()),
        "resize": how,
        "schooling": dataclasses.asdict(settings),
    }
    write_small_net(folder, net, {**about, "grades": dataclasses.asdict(accuracy)})
    return folder


def trained_facts(folder: Path) -> dict[str, object]:
    """For the protocol: the number of training images, side, training settings and validation accuracy."""
    record = read_sealed(folder / RECORD) or {}
    return {name: record.get(name) for name in ("pictures", "side", "schooling", "grades")}


def _images(config: RunConfig) -> Iterator[_TrainingImage]:
    """The images that the net learns from: the run's training images, or, if the data has only prompts or latents, those of
    evaluation.real_images."""
    data = source_data(config)
    if not (is_prompts_only(data.source) or is_cache(data.source)):
        for record in training_records(data, seed=data_seed(config)):
            yield _TrainingImage(record.name, record.version, functools.partial(_of_record, record, data))
    elif config.evaluation.real_images is not None:
        folder = ImageFolder.open(config.evaluation.real_images)
        for file in folder.files:
            yield _TrainingImage(
                str(file), functools.partial(version_of_file, file), functools.partial(_of_file, file)
            )


def _of_record(record: Record, data: Data, size: Size) -> np.ndarray:
    return cover(image_of(record, data), size)[0]


def _of_file(file: Path, size: Size) -> np.ndarray:
    return cover(Image.fromarray(read_rgb(file)), size)[0]


def _resized(chosen: Sequence[_TrainingImage], size: Size, how: str, side: int) -> Iterator[torch.Tensor]:
    """uint8 (1, 3, side, side) of each readable image, resized by the evaluation's protocol `how`."""
    for image in chosen:
        with contextlib.suppress(BadSample):  # counted by `prepare`
            pixels = torch.from_numpy(image.pixels(size)).permute(2, 0, 1)[None].contiguous()
            yield resize(pixels, how, size=side).round().clamp(0, 255).to(torch.uint8)
