"""Which size each image is cropped to: the teacher's, or with data.buckets a size of about as many pixels, with the aspect
ratio nearest the image's.

All samples of an update have one size. If a bucket held fewer images than an update takes, they would come in bursts: all
of them several times in one update, and none in the next hundred. So they are cropped to the nearest size that has enough
images.
"""

import copy
from collections.abc import Mapping
from typing import Any

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

from stepdistill.config import Data, RunConfig
from stepdistill.disk.durable import read_sealed
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.ladder_fit import check_side

Size = tuple[int, int]


def least_per_bucket(config: RunConfig) -> int:
    """The smallest number of images with which a bucket is used.

    It is data.min_per_bucket; if that is not set, the number that the run's cache was made with; without a cache, the
    samples of one update. So a run keeps its latents when its updates are split differently.
    """
    if config.data.min_per_bucket is not None:
        return config.data.min_per_bucket
    before = (read_sealed(config.run_dir / "cache" / "manifest.json") or {}).get("min_per_bucket")
    if isinstance(before, int) and before > 0:
        return before
    return config.training.train_batch_size * config.training.gradient_accumulation_steps


def scheduler_of(config: RunConfig, facts: TeacherFacts) -> Mapping[str, Any]:
    """The teacher's scheduler config at the run's image size, at which a dynamic shift is a fixed one."""
    if not facts.matches_flows:
        return facts.scheduler
    sizes = Sizes(config.data, teacher_size=facts.image_size, multiple=facts.size_multiple)
    return facts.scheduler_at(sizes.target)


def drawn_size(config: RunConfig, facts: TeacherFacts) -> Size | None:
    """The size of the students' training if the pipeline must be asked for it, as its configs give none or its shift depends
    on the size; None if the pipeline's default is right."""
    if facts.layout.image_side is None and not facts.scheduler.get("use_dynamic_shifting"):
        return None
    return Sizes(config.data, teacher_size=facts.image_size, multiple=facts.size_multiple).target


class Sizes:
    """The sizes (height, width) that a run's images are cropped to.

    Args:
        data: the config's `data` section.
        teacher_size: the size that the teacher draws by default.
        multiple: every side is a multiple of this number, the VAE's downsampling factor times the U-Net's; ConfigError if
            data.resolution is not.
    """

    def __init__(self, data: Data, *, teacher_size: Size, multiple: int) -> None:
        target = teacher_size if data.resolution is None else (data.resolution, data.resolution)
        for side in target:
            check_side(side, multiple)
        self.target: Size = target
        self.all: tuple[Size, ...] = (target,)
        if data.buckets:
            side = round((target[0] * target[1]) ** 0.5)
            buckets = generate_aspect_ratio_buckets(side, divisibility=multiple)
            self.all = tuple(dict.fromkeys([target, *buckets]))

    def of(self, image: Size) -> Size:
        """The size that an image of (height, width) is cropped to."""
        if len(self.all) == 1:
            return self.all[0]
        return self.all[find_nearest_bucket(*image, self.all)]

    def tally(self, images: Mapping[Size, int]) -> dict[Size, int]:
        """How many images are cropped to each size, without sizes that get none. `images`: counts by (height, width)."""
        counts = dict.fromkeys(self.all, 0)
        for image, count in images.items():
            counts[self.of(image)] += count
        return {size: count for size, count in counts.items() if count}

    def without_small(self, images: Mapping[Size, int], *, least: int) -> "Sizes":
        """A copy without the sizes that fewer than `least` images are cropped to.

        The size with the fewest images is removed first and its images are counted towards other sizes, until every size
        has enough or only one is left. Sizes that no image is cropped to are not removed.
        """
        sizes = copy.copy(self)
        while True:
            counts = sizes.tally(images)
            smallest = min(counts, key=lambda size: (counts[size], size), default=None)
            if smallest is None or len(counts) == 1 or counts[smallest] >= least:
                return sizes
            sizes.all = tuple(size for size in sizes.all if size != smallest)
