"""Which size each picture is cut to: the teacher's, or with buckets that of about as many pixels nearest its own ratio.

An update sees one size. Pictures of a bucket that has fewer than an update takes would come in bursts, all of them again and
again in one update and none in the next hundred, so they are cut to the nearest size that has enough.
"""

import copy
from collections.abc import Mapping

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

from stepdistill.config import ConfigError, Data, RunConfig

Size = tuple[int, int]


def least_per_bucket(config: RunConfig) -> int:
    """How many pictures a bucket must have to be used."""
    training = config.training
    return config.data.min_per_bucket or training.train_batch_size * training.gradient_accumulation_steps


class Sizes:
    """The sizes (height, width) that a run's pictures come in.

    Args:
        data: the config's section.
        teacher_size: what the teacher draws where nobody asks for another size.
        multiple: sides are multiples of it: the VAE's factor times the U-Net's.
    """

    def __init__(self, data: Data, *, teacher_size: Size, multiple: int) -> None:
        target = teacher_size if data.resolution is None else (data.resolution, data.resolution)
        if any(side % multiple for side in target):
            nearest = max(multiple, round(target[0] / multiple) * multiple)
            raise ConfigError(
                f"data.resolution: got {target[0]}; allowed: multiples of {multiple}, such as {nearest}"
            )
        self.target: Size = target
        self.all: tuple[Size, ...] = (target,)
        if data.buckets:
            side = round((target[0] * target[1]) ** 0.5)
            buckets = generate_aspect_ratio_buckets(side, divisibility=multiple)
            self.all = tuple(dict.fromkeys([target, *buckets]))

    def of(self, picture: Size) -> Size:
        """The size that a picture (height, width) is cut to."""
        if len(self.all) == 1:
            return self.all[0]
        return self.all[find_nearest_bucket(*picture, self.all)]

    def tally(self, pictures: Mapping[Size, int]) -> dict[Size, int]:
        """How many of the pictures are cut to each size, where any are; `pictures` counts them by (height, width)."""
        counts = dict.fromkeys(self.all, 0)
        for picture, count in pictures.items():
            counts[self.of(picture)] += count
        return {size: count for size, count in counts.items() if count}

    def without_small(self, pictures: Mapping[Size, int], *, least: int) -> "Sizes":
        """These sizes but for those that fewer than `least` of the pictures fall into, the smallest taken out first, as each
        leaves its pictures to others; one stays in any case. Sizes without any picture stay too."""
        sizes = copy.copy(self)
        while True:
            counts = sizes.tally(pictures)
            smallest = min(counts, key=lambda size: (counts[size], size), default=None)
            if smallest is None or len(counts) == 1 or counts[smallest] >= least:
                return sizes
            sizes.all = tuple(size for size in sizes.all if size != smallest)
