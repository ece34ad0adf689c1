"""Which size each picture is cut to: the teacher's, or with buckets that of about as many pixels nearest its own ratio."""

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

from stepdistill.config import ConfigError, Data

Size = tuple[int, int]


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
            found = generate_aspect_ratio_buckets(side, divisibility=multiple)
            self.all = tuple(dict.fromkeys([target, *found]))

    def of(self, picture: Size) -> Size:
        """The size that a picture (height, width) is cut to."""
        if len(self.all) == 1:
            return self.target
        return self.all[find_nearest_bucket(*picture, self.all)]
