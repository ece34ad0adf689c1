"""The sections of a run's YAML file: frozen, each field documented (docs/configuration.md), ladder checked. No torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from stepdistill.config.data import Data
from stepdistill.config.evaluation import Evaluation
from stepdistill.config.ladder import Rung
from stepdistill.config.ladder_checks import between_samples, check_ladder
from stepdistill.config.section import (
    Affects,
    BatchSize,
    ConfigError,
    ExpandedPath,
    FilePath,
    Name,
    PositiveFloat,
    PositiveInt,
    Rank,
    Section,
)
from stepdistill.config.shrink import Shrink, check_shrink


def _memory_size(value: object) -> object:
    """Text such as 16GiB, from that or from a number of GiB."""
    text = f"{value}GiB" if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not (isinstance(text, str) and re.fullmatch(r"(?!0+(\.0+)?\s?G)\d{1,5}(\.\d{1,3})?\s?Gi?B", text)):
        raise ValueError("a size in GiB, such as 16GiB or 7.5GiB")
    return text


MemorySize = Annotated[str, BeforeValidator(_memory_size)]
Quantization = Literal["none", "int8", "fp8", "nf4"]
"""How the base model's linear layers are stored; none: in the run's dtype."""


class TeacherLora(Section, affects=Affects.EVERY_RUNG):
    """A LoRA that is merged into the teacher before distillation."""

    path: FilePath
    """A .safetensors file, or a folder that holds one."""
    weight: float = 1.0
    """Weight at which the LoRA is merged."""


class Teacher(Section, affects=Affects.EVERY_RUNG):
    """The model to distil."""

    path: FilePath = "letters"
    """Where the model is: the folder of a diffusers pipeline, a single .safetensors checkpoint, a Hub repository such as
    org/name, or "letters", "letters_sd3" or "pairs", the small models that ship in the package."""
    revision: str | None = None
    """Commit, tag or branch, if `path` is a Hub repository."""
    variant: str | None = None
    """Variant of the weights to download, such as fp16, if `path` is a Hub repository."""
    config: FilePath | None = None
    """If `path` is a single file: a pipeline folder or Hub repository with the configs and tokenizers that belong to the
    file. Default: diffusers infers a repository from the file's keys and reads its configs from the cache or the Hub. If the
    file holds a transformer alone: the pipeline's folder, whose other parts are used."""
    loras: Annotated[tuple[TeacherLora, ...], Field(max_length=64)] = ()
    """LoRAs to merge into the teacher, which is then distilled with them."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """Classifier-free guidance scale of the first rung's teacher, of the teacher's rows in the table, and of the images
    that the teacher draws if `data.source` is a .txt file of prompts; 1 turns guidance off. Z-Image's pipeline counts from
    0: its guidance_scale 4 is 5 here."""
    unconditional: Literal["auto", "empty", "zeros"] = "auto"
    """Unconditional input of guidance. empty: the embedding of ""; zeros: zeros in place of the embedding; auto: what the
    pipeline itself uses, the embedding of "" for SD and zeros for SDXL."""


def _pattern(text: str) -> str:
    """The text itself; ValueError if it is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f'a regular expression, such as "cat|dog" ({error})') from None
    return text


class Expert(Section, affects=Affects.EVERY_RUNG):
    """One of several teachers: the model at teacher.path with LoRAs, or another model of the same shapes."""

    name: Name
    """Its name in the table."""
    loras: Annotated[tuple[TeacherLora, ...], Field(max_length=64)] = ()
    """LoRAs on the model at teacher.path, in diffusers' format. They stay apart from it, so they cost no second model."""
    path: FilePath | None = None
    """In place of LoRAs: the folder of another pipeline, whose U-Net is loaded beside the first. Its U-Net's shapes, its
    text encoders, prediction type and noise schedule must be those of teacher.path."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of its prediction in the mean over the experts of a prompt."""
    prompts: Annotated[str, Field(max_length=1000), AfterValidator(_pattern)] | None = None
    """Regular expression of the prompts that this teacher is asked for, searched for in the caption without regard to case.
    Default: all prompts."""


def check_experts(teachers: tuple[Expert, ...], ladder: tuple[Rung, ...]) -> None:
    """ConfigError if two teachers have one name, one has LoRAs and a path, or features of several are to be compared."""
    compares = next((number for number, phase in enumerate(ladder[0].phases) if phase.taps), None)
    if teachers and compares is not None:
        raise ConfigError(
            f"ladder.0.phases.{compares}.objectives: got {ladder[0].phases[compares].title} beside teachers; allowed: "
            f"mse and adversarial objectives on the first rung, because features are compared with one network's"
        )
    for index, teacher in enumerate(teachers):
        if teacher.loras and teacher.path is not None:
            raise ConfigError(
                f"teachers.{index}: got loras beside path: {teacher.path}; allowed: one of the two"
            )
        if teacher.name.lower() in {other.name.lower() for other in teachers[:index]}:
            raise ConfigError(
                f"teachers.{index}.name: got {teacher.name!r} twice; allowed: a name of its own for each"
            )


class LoraOptions(Section, affects=Affects.EVERY_RUNG):
    """The LoRA that is trained on every rung."""

    rank: Rank = 32
    """Rank of every rung's LoRA; alpha equals the rank."""


class CheckpointOptions(Section, affects=Affects.NOTHING):
    """Checkpoints of the rung that is being trained, from which the same command continues after a stop."""

    every_minutes: Annotated[float, Field(ge=0)] | None = 10.0
    """Minutes between two checkpoints; 0 writes one after every update, null only between two phases."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Number of the newest checkpoints that stay on disk, besides the one at the start of the phase. All are removed when
    the rung is finished."""


class Training(Section, affects=Affects.EVERY_RUNG):
    """Settings of the optimisation, the same for all phases."""

    train_batch_size: Annotated[BatchSize, Affects.SPLIT] = 32
    """Number of samples per micro-batch and process."""
    gradient_accumulation_steps: Annotated[BatchSize, Affects.SPLIT] = 1
    """Number of micro-batches per update. Another split of the same samples changes an update only by rounding."""
    optimizer: Literal["adam", "adamw", "adam8bit", "prodigy"] = "adam"
    """adam: as in SDXL-Lightning; adamw: with a weight decay of 0.01; adam8bit: Adam with its moments in 8 bits, a quarter
    of their memory (torchao's; needs the extra "quantize" and a compiler); prodigy: sets its own step size, of which
    learning_rate is a factor, usually 1 (needs the extra "prodigy")."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which gradients are clipped, separately for student and discriminator."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Number of updates of linear warm-up at the start of each phase, but never more than a tenth of the phase."""
    lr_final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the learning rate that is left at the end of each phase, after cosine decay."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the student's weights, which is the result of each phase; 0 keeps the last weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """no: float32; bf16 and fp16: the network computes in bfloat16 or float16. Trained weights, sums of gradients and the
    optimiser are always float32. fp16 also scales the loss; it is meant for cards without bfloat16."""
    base_quantization: Quantization = "none"
    """int8 and fp8 store the base model's linear layers in 8 bits with one scale per row, in half of the memory that they
    take in bfloat16; nf4 in 4 bits, as QLoRA does, in a fourth (torchao's forms; need the extra "quantize"). int8 has the
    smallest error, nf4 the largest; the run stops if the output of the quantised model is too far from the original's. The
    LoRA is trained on the quantised base model and evaluated on the original one."""
    compile: Annotated[bool, Affects.NOTHING] = False
    """Compile the repeated blocks of the network with torch.compile: fewer and larger kernels on a GPU, after some minutes
    of compiling; it changes results only by rounding. Needs a C++ compiler. On a CPU it gains little."""
    channels_last: Annotated[bool, Affects.NOTHING] = False
    """Store images between layers with the channels of a pixel side by side (torch's channels_last memory format), as GPUs'
    matrix units read them in convolutions; it changes results only by rounding. Whether it is faster depends on the GPU."""
    gradient_checkpointing: Annotated[bool, Affects.NOTHING] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    memory_budget: Annotated[MemorySize | None, Affects.NOTHING] = None
    """Memory of a GPU that training may fill, such as 16GiB. With gradient_checkpointing, the activations of as many blocks
    as fit are then kept in place of being computed again, for each phase by its own need. Default: none are kept."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    """Checkpoints within a rung."""
    max_minutes: Annotated[PositiveFloat | None, Affects.NOTHING] = None
    """Minutes after the command's start at which training stops: it finishes the update, saves the state and exits with code
    75, so that the same command continues there; for clusters that end jobs without notice. The time before training counts,
    too, but preparing and evaluating are not stopped. At least one update is made. Default: no limit."""
    guard: Annotated[Literal["warn", "rewind"], Affects.NOTHING] = "warn"
    """What happens in an adversarial phase if the discriminator is nearly always right, or if the student's distance to the
    teacher on 16 fixed samples rises to 4 times that at the phase's start. warn: a warning; rewind: training goes back to
    the last checkpoint before that, with half the discriminator's learning rate, up to 4 times. A discriminator that is at
    chance for long is warned of in both cases."""
    distributed_timeout: Annotated[float, Field(ge=0.1, le=10_000), Affects.NOTHING] = 30.0
    """Minutes that the processes of a launch wait for one that does not answer; then all of them end with code 8. It must be
    longer than one process works alone, as when it counts the images of a large data set."""
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(max_length=3), Affects.NOTHING
    ] = ()
    """Trackers that get the numbers of every update and the preview images. tensorboard writes into the run's folder and
    needs no account (extra "trackers"): `tensorboard --logdir runs`."""
    logging_steps: Annotated[PositiveInt, Affects.NOTHING] = 20
    """If the output is not a terminal, print a line every so many updates; the JSONL log has every update."""
    preview_steps: Annotated[int, Field(ge=0), Affects.NOTHING] = 0
    """Draw a preview image every so many updates, besides the one at the end of each phase; 0 draws that one alone."""

    @property
    def memory_budget_bytes(self) -> float | None:
        """memory_budget in bytes; GB and GiB both count 2^30, as on the cards' boxes."""
        if self.memory_budget is None:
            return None
        return float(self.memory_budget.rstrip("GiB ")) * 2**30

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        return "no" if value is False else value  # YAML 1.1 reads a bare no as false


class PreviewOptions(Section, affects=Affects.NOTHING):
    """Images that are drawn during training."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    """Prompts that teacher and student draw in every preview image, from the same fixed noise."""
    looks_images: Annotated[int, Field(ge=0, le=256)] = 8
    """Number of images that the student draws at the end of each phase for captions of the data. They tell the report
    which phase changed sharpness, contrast or colour; 0 leaves this out."""


class Export(Section, affects=Affects.NOTHING):
    """The files that are written for every finished rung."""

    formats: Annotated[tuple[Literal["diffusers", "kohya", "fused", "onnx"], ...], Field(min_length=1)] = (
        "diffusers",
        "kohya",
    )
    """Formats to write. diffusers: LoRA, scheduler and model card, which are always written; kohya: one LoRA file for
    ComfyUI, A1111, Forge and kohya's tools, with a workflow for ComfyUI; fused: the U-Net with the LoRA merged; onnx: the
    merged U-Net for onnxruntime, in float32 (needs the extra "onnx")."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Data type of the kohya file and of the fused U-Net; each is rounded to it once."""
    rank: Rank | None = None
    """Reduce the LoRA to this lower rank by singular values; the files go into rank<R>/. Default: the trained rank."""
    quantize: Literal["none", "int8"] = "none"
    """For onnx: int8 also writes the U-Net with 8-bit weights and activations (onnx-int8/), a fourth as large, whose ranges
    are measured while the student draws captions of the run's cache."""
    kohya_names: Literal["auto", "diffusers", "sgm"] = "auto"
    """Module names in the kohya file: those of diffusers or those of the original repository (sgm). auto: the names that
    kohya's trainer uses, sgm for SDXL and diffusers for SD."""
    base_model: str | None = None
    """Hub repository of the base model, for the model card. Default: teacher.path if that is a Hub repository."""
    license: str | None = None
    """Licence of the LoRA, for the model card and the kohya file's header. Default: none is stated."""


class RunConfig(Section, affects=Affects.EVERY_RUNG):
    """A whole run."""

    name: Annotated[Name, Affects.NOTHING]
    """Name of the run; its folder is output_dir/name. Change it only if you rename that folder, too; otherwise a new run
    begins."""
    output_dir: Annotated[ExpandedPath, Affects.NOTHING] = "runs"
    """Folder that holds the runs' folders. Change it only if you move the run's folder, too; otherwise a new run begins."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Seed from which all randomness of the run is derived."""
    start_from: FilePath | None = None
    """Folder of a finished rung of another run with the same teacher, such as runs/first/rungs/32. That rung, and the rungs
    before it in this ladder, are copied from the other run; this run trains only the rungs after it."""
    teacher: Teacher = Teacher()
    teachers: Annotated[tuple[Expert, ...], Field(max_length=16)] = ()
    """Several teachers in place of the model at teacher.path alone, which remains what the student is a LoRA on. The first
    rung learns from the mean of their predictions, or for each prompt from those whose `prompts` it has."""
    lora: LoraOptions = LoraOptions()
    data: Data = Data()
    training: Training = Training()
    ladder: Annotated[tuple[Rung, ...], Field(min_length=1, max_length=64)]
    shrink: Shrink | None = None
    """A smaller base model, made before the ladder, which then climbs on it. Default: the teacher's own U-Net."""
    preview: PreviewOptions
    evaluation: Evaluation = Evaluation()
    export: Export = Export()

    _written: "RunConfig | None" = PrivateAttr(None)

    @property
    def as_written(self) -> "RunConfig":
        """The config that a user wrote, if this one stands for it in a part of the run; else this one."""
        return self._written or self

    def standing_for(self, changes: dict[str, Any]) -> "RunConfig":
        """A copy with these fields changed, which stands for this config in a part of the run: checkpoints and hashes still
        depend on what was written."""
        copy = self.model_copy(update=changes)
        copy._written = self.as_written
        return copy

    @property
    def run_dir(self) -> Path:
        """The run's folder, output_dir/name."""
        return Path(self.output_dir) / self.name

    def prediction_types(self, base: str) -> list[str]:
        """What each rung's student predicts: its prediction_type, else that of the rung before; the teacher's is `base`."""
        kinds, kind = [], base
        for rung in self.ladder:
            kind = rung.prediction_type or kind
            kinds.append(kind)
        return kinds

    @model_validator(mode="after")
    def _check_ladder(self) -> "RunConfig":
        check_ladder(self.ladder)
        check_experts(self.teachers, self.ladder)
        check_shrink(
            self.shrink,
            self.ladder[0],
            has_teachers=bool(self.teachers),
            has_start=self.start_from is not None,
            micro_batch=self.training.train_batch_size,
        )
        if self.training.memory_budget is not None and not self.training.gradient_checkpointing:
            raise ConfigError(
                "training.memory_budget: got a budget without gradient_checkpointing, whose computing again it limits; fix: "
                "training.gradient_checkpointing=true"
            )
        if self.training.base_quantization == "nf4" and self.training.mixed_precision == "fp16":
            raise ConfigError(
                "training.base_quantization: got nf4 with mixed_precision fp16, in which scales of small weights overflow; "
                "allowed: int8 or fp8, or mixed_precision bf16 or no"
            )
        between = next(between_samples(self.ladder), None)
        if between is not None and self.training.train_batch_size < 2:
            raise ConfigError(
                f"{between}: got samples with a training.train_batch_size of 1; allowed: patches, or micro-batches of 2 "
                f"samples or more, as one sample has no relations"
            )
        return self
