"""The `data` section of a config: where samples come from, how images are cropped, what to do with bad ones. No torch."""

from collections.abc import Iterable
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stepdistill.config.section import Affects, ConfigError, FilePath, PositiveInt, Section, Steps

Kind = Literal[
    "image_missing",
    "image_unreadable",
    "image_too_large",
    "image_too_small",
    "image_animated",
    "caption_missing",
    "caption_empty",
    "caption_not_utf8",
    "caption_too_long",
    "unsafe_member",
    "archive_broken",
    "latent_not_finite",
]
"""The ways in which a sample can be bad."""
KINDS: tuple[Kind, ...] = get_args(Kind)
WORLDS = ("letters", "pairs")
"""The sources that the package renders (demo/world.py)."""
_MAX_RENDERINGS = 10**7  # the captions of all of them are chosen in advance and kept in memory
_CURES = {"image_too_small": "min_side", "image_too_large": "max_pixels"}
# One such sample means that many others may be missing or wrong, so by default it stops `prepare`.
_STOPS: tuple[Kind, ...] = ("archive_broken", "latent_not_finite")


class Data(Section, affects=Affects.EVERY_RUNG):
    """The samples to distil on: images with captions, prompts alone, or the latents of another run."""

    source: FilePath = "letters"
    """Where the samples come from: "letters" or "pairs", the demo data that the package renders; a folder of NAME.png with
    NAME.txt, or with metadata.jsonl or metadata.csv; a .tar or .parquet file, or a folder of them; a .txt file with one
    prompt per line, for which the teacher draws the images; or the cache folder of another run with the same teacher."""
    num_images: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """Number of samples in the cache. Demo data: the number of renderings (default 4096 for letters, 16384 for pairs).
    Images and prompts: only the first so many are used (default all); if there are fewer prompts, they are repeated with new
    noise. For another run's cache it has no effect: all latents are used."""
    held_out: Annotated[float | None, Field(ge=0, lt=1, validate_default=True)] = None
    """Share of the captions that distillation never sees; above 0, the table is measured on these captions alone. Default
    for your own images: 0.05 if that holds out at least 64 captions (which takes about 1,280), else 0. Default for
    demo data and for prompts alone: 0. Default for another run's cache: the share that the cache was made with."""
    resolution: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Side of the images in pixels; with `buckets`, the square root of each bucket's number of pixels. Default: the size
    that the teacher draws."""
    buckets: bool = False
    """Crop each image to the bucket with the aspect ratio nearest its own, instead of cropping all to one size. All
    images of an update come from one bucket."""
    min_per_bucket: PositiveInt | None = None
    """Fewest images that a bucket may have. Images of a rarer ratio are cropped to the nearest bucket with enough, as
    otherwise the same few would fill whole updates. Default: the samples of one update, train_batch_size times
    gradient_accumulation_steps; if several processes train, set it to that times their number. A run keeps the number that
    its cache was made with."""
    teacher_steps: Steps = 32
    """Sampling steps that the teacher takes for each image that it draws, if `source` is a .txt file of prompts."""
    min_side: PositiveInt = 16
    """An image is bad (image_too_small) if its shorter side has fewer pixels than this."""
    max_pixels: PositiveInt = 2**26
    """An image is bad (image_too_large) if it has more pixels than this; it is then not decoded."""
    on_bad: Annotated[dict[Kind, Literal["skip", "error"]], Affects.NOTHING] = Field(default_factory=dict)
    """What to do with a bad sample, by kind, such as {image_too_small: error}: skip leaves it out and counts it, error stops
    `prepare`. Default: error for archive_broken and latent_not_finite, skip for the other kinds."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), Affects.NOTHING] = 0.01
    """`prepare` stops if more than this share of the samples is bad; what it has prepared by then is kept."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the latents and text embeddings in the cache."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the VAE encodes images. float16 is not offered, because SDXL's VAE overflows in it."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the text encoders run. SD3's T5 has 4.7 billion parameters: 18 GiB in float32."""

    @field_validator("held_out")
    @classmethod
    def _default_held_out(cls, value: float | None, info: ValidationInfo) -> float | None:
        """0 for demo data and prompts; other sources' default (None) is resolved later, as the source must be read."""
        source = str(info.data.get("source", ""))
        is_zero = source in WORLDS or source.endswith(".txt")
        return 0.0 if value is None and is_zero else value

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.source in WORLDS and (self.num_images or 0) > _MAX_RENDERINGS:
            raise ConfigError(
                f"data.num_images: got {self.num_images}; allowed: up to {_MAX_RENDERINGS} renderings of {self.source}"
            )
        return self

    def policy(self, kind: Kind) -> Literal["skip", "error"]:
        """What to do with a bad sample of this kind."""
        return self.on_bad.get(kind, "error" if kind in _STOPS else "skip")

    def cures(self, kinds: Iterable[str]) -> list[str]:
        """The keys, each with its present value, that can be changed so that samples bad of these kinds pass."""
        keys = dict.fromkeys(_CURES[kind] for kind in kinds if kind in _CURES)
        return [f"data.{key} (now {getattr(self, key)})" for key in keys]
