"""The part of a config that says what is drawn and what is measured. No torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepdistill.config.section import MOST_STEPS, BatchSize, ConfigError, FilePath, Name, Section, Steps

FewImages = Annotated[int, Field(gt=0, le=10_000)]
Timestep = Annotated[int, Field(ge=0, lt=1000)]


class LoraRow(Section):
    """A row for any other LoRA of the same base: one of the field's, or another run's."""

    name: Name
    """The row's name."""
    path: FilePath
    """A safetensors file, or a folder with pytorch_lora_weights.safetensors."""
    steps: Steps
    """num_inference_steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """As its authors say; up to 1 is off."""
    scale: float = 1.0
    """Weight of the LoRA."""
    scheduler: str | None = None
    """A diffusers scheduler class, made from the base's scheduler config; where not given the one in scheduler/ beside the
    weights, or DDIMScheduler with trailing timesteps."""
    scheduler_options: dict[str, bool | int | float | str] | None = None
    """What to change in that config; trailing timesteps where not given, nothing in one that lies beside the weights."""
    timesteps: Annotated[tuple[Timestep, ...], Field(min_length=1, max_length=MOST_STEPS)] | None = None
    """Explicit timesteps, such as DMD2's 999, 749, 499, 249; the scheduler's own where not given."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the schedulers that know it (DDIM, TCD)."""


class Evaluation(Section):
    """The table: what is drawn and what is measured."""

    num_images: Annotated[int, Field(ge=8, le=10**6)] = 500
    """Images per row."""
    prompts: FilePath | None = None
    """A text file, one prompt a line, used in order and again from the start; the captions of `data` where not given."""
    real_images: FilePath | None = None
    """A folder of pictures that `*_to_real` compares with; where not given the pictures of `data`, letters fresh."""
    reference_stats: FilePath | None = None
    """An .npz with mu and sigma of real images under the same extractor and resize, for `fid_to_real` without pictures."""
    teacher_steps: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=64)] = (32, 8, 4, 2, 1)
    """Rows of the undistilled teacher. The first is the reference: paired distances compare with its images; FID and KID to
    teacher with images that it draws from other seeds."""
    unguided_steps: Annotated[tuple[Steps, ...], Field(max_length=64)] = ()
    """Rows of the undistilled teacher without guidance: as many passes as a student, often nearer to real images."""
    loras: Annotated[tuple[LoraRow, ...], Field(max_length=256)] = ()
    """Rows of other LoRAs."""
    batch_size: BatchSize = 64
    """Images per pipeline call."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the pipeline draws in."""
    features: FilePath | None = None
    """What FID, KID, precision and coverage are measured on: inception[:FILE], clip:FOLDER, dinov2:FOLDER, trained (a small
    net that learns from the run's own pictures, minutes on a CPU), trained:FOLDER (another run's evaluation/extractor) or
    reader (of letters). Where not given: reader for letters, else inception where its weights are on disk, else trained."""
    resize: Literal["none", "torchmetrics", "tf1", "pil_bicubic", "lanczos512"] | None = None
    """How images reach the extractor's size; where not given none (reader), torchmetrics (inception), else pil_bicubic."""
    patch_size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Patch FID on the centre crop of this size, without resize (299 for Inception); off where not given."""
    clip: FilePath | None = None
    """A CLIP folder: CLIP score and CMMD."""
    dinov2: FilePath | None = None
    """A DINOv2 folder: FD-DINOv2."""
    floor: bool = True
    """Draw the teacher once more with other seeds: what `*_to_teacher` compares with, and how far the teacher is from that
    itself. Without it only the paired distances to the teacher, at equal noise, are measured."""
    diversity_prompts: Annotated[int, Field(ge=0, le=10_000)] = 8
    """How many prompts are drawn with several seeds each; 0 leaves diversity out."""
    diversity_seeds: Annotated[int, Field(ge=2, le=10_000)] = 8
    """Seeds per prompt."""
    lora_scales: Annotated[tuple[float, ...], Field(max_length=64)] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    """Every rung's LoRA at these weights on a few images; () leaves the sweep out."""
    matrix: bool = True
    """Every rung's LoRA sampled at every rung's steps on a few images."""
    study_images: FewImages = 8
    """Images per cell of the sweep and the matrix."""
    cost_batch_sizes: Annotated[tuple[BatchSize, ...], Field(max_length=64)] = (1, 8, 32)
    """Batches that seconds, images/s and memory are measured at; () leaves cost out."""
    score_cmd: str | None = None
    """An outside scorer: a command with {images} (a folder) and {prompts} (a file); its last line is a JSON object."""
    grid_columns: FewImages = 10
    """Prompts in the picture."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        names, reserved = [lora.name for lora in self.loras], ("teacher-", "student-", "unguided-")
        taken = sorted({n for n in names if names.count(n) > 1 or n.startswith(reserved)})
        if taken:
            raise ConfigError(
                f"evaluation.loras: got the name {taken[0]!r}; allowed: names of their own, "
                "not teacher-N, student-N or unguided-N"
            )
        return self
