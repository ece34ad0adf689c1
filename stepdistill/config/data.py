"""What a config says of the data: where samples come from, how they are cut, what becomes of bad ones. No torch."""

from collections.abc import Iterable
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stepdistill.config.section import ConfigError, FilePath, PositiveInt, Section, Steps

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
"""How a sample can be bad."""
KINDS: tuple[Kind, ...] = get_args(Kind)
_MOST_RENDERINGS = 10**7  # their captions are chosen beforehand and held in memory
_CURES = {"image_too_small": "min_side", "image_too_large": "max_pixels"}
# One sample of these says that all of the rest may be gone or wrong.
_STOPS: tuple[Kind, ...] = ("archive_broken", "latent_not_finite")


class Data(Section):
    """What noise is added to."""

    source: FilePath = "letters"
    """letters; a folder of NAME.png with NAME.txt, or with metadata.jsonl / .csv; .tar or .parquet files or a folder of
    them; a .txt of prompts, whose pictures the teacher makes; or the cache folder of another run of the same teacher."""
    num_images: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """How many samples go into the cache: renderings of letters (4096 where not given), else the first so many (all);
    of prompts alone, more than there are go round again with other noise; another run's latents are taken whole."""
    held_out: Annotated[float | None, Field(ge=0, lt=1, validate_default=True)] = None
    """Share of the captions that distillation does not see; the table is then about these alone. Where not given: 0.05 of
    one's own pictures if that leaves 64 (of about 1,280), 0 of fewer, of letters and of prompts alone; as its lender's of
    another run's cache."""
    resolution: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Pixels a side, or the square root of a bucket's pixels; the teacher's own where not given."""
    buckets: bool = False
    """Each picture in the aspect ratio nearest its own instead of a square; an update sees one ratio."""
    min_per_bucket: PositiveInt | None = None
    """Pictures of a ratio that fewer have are cut to the nearest that has as many, as they would come in bursts; the samples
    of an update where not given, train_batch_size times gradient_accumulation_steps: times the processes is best where
    several train."""
    teacher_steps: Steps = 32
    """Of prompts alone: the teacher's steps for each of its pictures."""
    min_side: PositiveInt = 16
    """Pictures with a shorter side are bad."""
    max_pixels: PositiveInt = 2**26
    """Pictures with more pixels are bad, and are not decoded."""
    on_bad: dict[Kind, Literal["skip", "error"]] = Field(default_factory=dict)
    """What a bad sample of a kind leads to. Where not given: skip, which counts it; error for archive_broken and
    latent_not_finite."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Above this share of bad samples `prepare` stops; what it prepared stays."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of latents and text embeddings in the cache."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the VAE encodes in; SDXL's overflows in float16, so that is no choice."""

    @field_validator("held_out")
    @classmethod
    def _none_where_nothing_is_looked_at(cls, value: float | None, info: ValidationInfo) -> float | None:
        source = str(info.data.get("source", ""))
        needs_no_look = source == "letters" or source.endswith(".txt")
        return 0.0 if value is None and needs_no_look else value

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.source == "letters" and (self.num_images or 0) > _MOST_RENDERINGS:
            raise ConfigError(
                f"data.num_images: got {self.num_images}; allowed: up to {_MOST_RENDERINGS} renderings of letters"
            )
        return self

    def policy(self, kind: Kind) -> Literal["skip", "error"]:
        """What a bad sample of this kind leads to."""
        return self.on_bad.get(kind, "error" if kind in _STOPS else "skip")

    def cures(self, kinds: Iterable[str]) -> list[str]:
        """The keys, as they are now, by which samples that are bad of these kinds would be good."""
        keys = dict.fromkeys(_CURES[kind] for kind in kinds if kind in _CURES)
        return [f"data.{key} (now {getattr(self, key)})" for key in keys]
