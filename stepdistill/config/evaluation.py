"""The `evaluation` section of a config: which images are drawn for the table and what is measured on them. No torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepdistill.config.section import (
    MAX_STEPS,
    Affects,
    BatchSize,
    ConfigError,
    ExpandedPath,
    Name,
    Section,
    Steps,
)

COST_REPEATS = 2
"""How many times the cost of a row is measured at each batch size."""
LATENTS_KEPT = 2048
"""Latents of the first images only are stored: enough for a mean, 0.5 GB at SDXL's 4 x 128 x 128."""

FewImages = Annotated[int, Field(gt=0, le=10_000)]
Timestep = Annotated[int, Field(ge=0, lt=1000)]

_BEGINNINGS = ("teacher-", "student-", "unguided-", "smaller-base-")  # of the names of other rows
# Folders and files of a run's evaluation/, where each row has a folder of its name.
_OF_THE_TABLE = (
    *("extractor", "features", "floor", "matrix"),
    *("results.json", "scales", "seeds", "studies"),
)


class LoraRow(Section, affects=Affects.NOTHING):
    """A row of the table for another LoRA of the same base model: a published one, or one of another run."""

    name: Name
    """Name of the row. It must be unique, must not begin with teacher-, student- or unguided-, and must not be the name of a
    folder or file of the table itself, such as floor."""
    path: ExpandedPath
    """A .safetensors file, or a folder that holds pytorch_lora_weights.safetensors."""
    steps: Steps
    """Number of sampling steps (num_inference_steps)."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Guidance scale that the LoRA's authors recommend; up to 1, guidance is off."""
    scale: float = 1.0
    """Weight at which the LoRA is applied."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class, built from the base model's scheduler config. Default: the scheduler saved in
    scheduler/ beside the weights; if there is none, DDIMScheduler, or FlowMatchEulerDiscreteScheduler on a flow."""
    scheduler_options: dict[str, bool | int | float | str] | None = None
    """Values to change in the scheduler's config. Default: {timestep_spacing: trailing}; for a scheduler saved beside the
    weights, nothing."""
    timesteps: Annotated[tuple[Timestep, ...], Field(min_length=1, max_length=MAX_STEPS)] | None = None
    """Explicit list of timesteps, such as DMD2's [999, 749, 499, 249]. Default: those that the scheduler chooses."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Value of eta, for the schedulers that take it (DDIM, TCD)."""


class Evaluation(Section, affects=Affects.NOTHING):
    """The table of results: which images are drawn and what is measured on them."""

    num_images: Annotated[int, Field(ge=8, le=10**6)] = 500
    """Number of images per row."""
    prompts: ExpandedPath | None = None
    """A text file with one prompt per line, used in order and then again from the first. Default: the captions of `data`,
    only the held-out ones if `data.held_out` is above 0."""
    real_images: ExpandedPath | None = None
    """A folder of images to which `*_to_real`, precision, recall, density and coverage compare. Default: the images of
    `data`, only the held-out ones if `data.held_out` is above 0; for demo data, new renderings of the prompts."""
    reference_stats: ExpandedPath | None = None
    """An .npz file with mean (mu) and covariance (sigma) of real images' features, made with the same extractor and resize;
    `fid_to_real` then needs no images."""
    teacher_steps: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=64)] = (32, 8, 4, 2, 1)
    """Step counts of the undistilled teacher's rows. The first row is the reference: paired distances compare with its
    images, and FID and KID to teacher compare with images that it draws from other seeds."""
    unguided_steps: Annotated[tuple[Steps, ...], Field(max_length=64)] = ()
    """Step counts of rows that the undistilled teacher draws without guidance. Such a row takes as many network passes as a
    student at the same steps, and is often nearer to real images than the row with guidance."""
    onnx: Annotated[tuple[Literal["float32", "int8"], ...], Field(max_length=2)] = ()
    """Also draw with the U-Nets that export writes for onnxruntime: a row for every rung and each of these. Needs onnx among
    export.formats, and for int8 export.quantize=int8."""
    loras: Annotated[tuple[LoraRow, ...], Field(max_length=256)] = ()
    """Other LoRAs to draw and measure, one row each."""
    batch_size: BatchSize = 64
    """Number of images drawn per call of the pipeline."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type in which the pipeline draws."""
    features: ExpandedPath | None = None
    """Feature extractor for FID, KID, precision, recall, density and coverage: inception or inception:FILE, clip:FOLDER,
    dinov2:FOLDER, trained (a small network that learns from the run's training images, in minutes on a CPU), trained:FOLDER
    (the evaluation/extractor folder of another run), reader (made for letters) or pairs_reader (made for pairs). Default:
    for demo data its reader; for other images inception if its weights are on disk, else trained if there are 200 images or
    more, else none."""
    resize: Literal["none", "torchmetrics", "tf1", "pil_bicubic", "lanczos512"] | None = None
    """How images are resized to the extractor's input size. Default: none for the readers, torchmetrics for inception,
    pil_bicubic for the other extractors."""
    patch_size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Measure patch FID on a centre crop of this side, without resizing. It must be the extractor's input size, such as 299
    for Inception. Default: no patch FID."""
    clip: ExpandedPath | None = None
    """Folder of a CLIP model; with it, CLIP score and CMMD are measured."""
    pickscore: ExpandedPath | None = None
    """Folder of PickScore's CLIP model (yuvalkirstain/PickScore_v1); with it, PickScore is measured."""
    dinov2: ExpandedPath | None = None
    """Folder of a DINOv2 model; with it, FD-DINOv2 is measured."""
    floor: bool = True
    """Draw the teacher's images once more from other seeds. `*_to_teacher` compares with these images, and the teacher's own
    distance to them is the floor. If false, only the paired distances to the teacher, at equal noise, are measured."""
    diversity_prompts: Annotated[int, Field(ge=0, le=10_000)] = 8
    """Number of prompts that are drawn from several seeds each to measure diversity; 0 leaves diversity out."""
    diversity_seeds: Annotated[int, Field(ge=2, le=10_000)] = 8
    """Number of seeds per prompt when diversity is measured."""
    lora_scales: Annotated[tuple[float, ...], Field(max_length=64)] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    """LoRA weights of the scale sweep: every rung draws `study_images` images at each. An empty list turns it off."""
    matrix: bool = True
    """Draw `study_images` images with every rung's LoRA at every rung's number of steps."""
    study_images: FewImages = 8
    """Number of images per cell of the scale sweep and of the matrix."""
    cost_batch_sizes: Annotated[tuple[BatchSize, ...], Field(max_length=64)] = (1, 8, 32)
    """Batch sizes at which seconds, images per second and peak memory are measured. An empty list leaves cost out."""
    score_cmd: str | None = None
    """Command of an external scorer. {images} is replaced by a folder of images and {prompts} by a file with one prompt per
    line; the last line that the command prints must be a JSON object of numbers."""
    grid_columns: FewImages = 10
    """Number of prompts (columns) in the report's image grid."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        names = [lora.name.lower() for lora in self.loras]  # some file systems do not tell A from a
        for index, name in enumerate(names):
            if name.startswith(_BEGINNINGS) or name in _OF_THE_TABLE or names.count(name) > 1:
                raise ConfigError(
                    f"evaluation.loras.{index}.name: got {self.loras[index].name!r}; allowed: a different name for each, "
                    f"none that begins with {', '.join(_BEGINNINGS)}, none of {', '.join(_OF_THE_TABLE)}"
                )
        return self
