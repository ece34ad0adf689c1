"""What one YAML file says of a run: frozen sections, every field documented, the ladder checked. No torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stepdistill.config.data import Data
from stepdistill.config.evaluation import Evaluation
from stepdistill.config.ladder import Rung, check_ladder
from stepdistill.config.section import (
    BatchSize,
    FilePath,
    Name,
    PositiveFloat,
    PositiveInt,
    Rank,
    Section,
)


class TeacherLora(Section):
    """A LoRA that is part of the teacher."""

    path: FilePath
    """A .safetensors file, or a folder that holds one."""
    weight: float = 1.0
    """How much of it."""


class Teacher(Section):
    """The model to distil."""

    path: FilePath = "letters"
    """A diffusers pipeline's folder, one .safetensors checkpoint, or a repository of the Hub such as org/name; "letters"
    for the one that ships in the package."""
    revision: str | None = None
    """Of a repository: commit, tag or branch."""
    variant: str | None = None
    """Of a repository: which of its weights, such as fp16."""
    config: FilePath | None = None
    """Of a single file: the pipeline's folder or repository whose configs and tokenizers belong to it. Where not given
    diffusers looks up the one that the file's keys point to, in its cache or on the Hub."""
    loras: Annotated[tuple[TeacherLora, ...], Field(max_length=64)] = ()
    """LoRAs baked into the teacher: what is distilled draws with them."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """Classifier-free guidance of the first rung's teacher and of the teacher's rows in the table; 1 is off."""
    unconditional: Literal["auto", "empty", "zeros"] = "auto"
    """What stands for no prompt: the embedding of "", or zeros; auto as the pipeline has it: "" for SD, zeros for SDXL."""


class Lora(Section):
    """What trains."""

    rank: Rank = 32
    """Rank of every rung's LoRA; alpha equals it."""


class Training(Section):
    """How every phase is optimised, unless the phase says otherwise."""

    train_batch_size: BatchSize = 32
    """Samples per micro-batch and process."""
    gradient_accumulation_steps: BatchSize = 1
    """Micro-batches per update; what an update computes does not depend on the split."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm, student and discriminator each."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Updates of linear warm-up at the start of each phase, a tenth of the phase at most."""
    lr_final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The learning rate decays along a cosine to this share of itself."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the student's moving average, which is then what a phase leaves; 0 keeps the last weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """The base in bfloat16 or float16 under autocast; what trains stays float32. fp16 scales the loss, for cards without
    bfloat16."""
    base_quantization: Literal["none", "int8"] = "none"
    """int8 keeps the base's linear layers in 8 bits, a scale per row (torchao's weight-only form, extra "quantize"): half of
    their memory in bfloat16. The LoRA is trained on that base and measured on the whole one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    logging_steps: PositiveInt = 20
    """A console line every so many updates; the JSONL log has every one."""
    preview_steps: Annotated[int, Field(ge=0)] = 0
    """A preview picture every so many updates, beside the one at the end of each phase; 0 is only that one."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        return "no" if value is False else value  # YAML 1.1 reads a bare no as false


class Preview(Section):
    """Pictures while training."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    """Fixed prompts, drawn from fixed noise by teacher and student."""
    looks_images: Annotated[int, Field(ge=0, le=256)] = 8
    """Pictures of the data's captions that the student draws at the end of each phase, by which the report tells which phase
    moved sharpness, contrast or colour; 0 leaves that out."""


class Export(Section):
    """The files of a finished rung."""

    formats: Annotated[tuple[Literal["diffusers", "kohya", "fused", "onnx"], ...], Field(min_length=1)] = (
        "diffusers",
        "kohya",
    )
    """diffusers: LoRA, scheduler, card, which are always there; kohya: one file for ComfyUI, A1111, Forge and kohya's tools,
    and ComfyUI's workflow for it;
    fused: the U-Net with the LoRA merged; onnx: the same for onnxruntime (extra "onnx")."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of kohya's file and of the fused U-Net, each rounded once."""
    rank: Rank | None = None
    """A lower rank, by singular values, into a folder of its own; the trained one where not given."""
    kohya_names: Literal["auto", "diffusers", "sgm"] = "auto"
    """Spelling of modules in kohya's file; auto is what kohya trains: the original's for SDXL, diffusers' for SD."""
    base_model: str | None = None
    """The base's repository on the Hub, for the card; teacher.path where that is one."""
    license: str | None = None
    """Of the LoRA, as you state it, on the card and in kohya's header; none is made up."""


class RunConfig(Section):
    """A whole run."""

    name: Name
    """The run's folder is output_dir/name."""
    output_dir: FilePath = "runs"
    """Where run folders are."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Everything random is derived from it."""
    start_from: FilePath | None = None
    """A finished rung of another run of the same teacher, such as runs/first/rungs/32: that rung and those before it in this
    ladder are copied from there, and this run trains the ones after it."""
    teacher: Teacher = Teacher()
    lora: Lora = Lora()
    data: Data = Data()
    training: Training = Training()
    ladder: Annotated[tuple[Rung, ...], Field(min_length=1, max_length=64)]
    preview: Preview
    evaluation: Evaluation = Evaluation()
    export: Export = Export()

    @property
    def run_dir(self) -> Path:
        """output_dir/name."""
        return Path(self.output_dir) / self.name

    def prediction_types(self, base: str) -> list[str]:
        """What each rung's student predicts: its own setting, or as the rung before; `base` is what the teacher predicts."""
        kinds, kind = [], base
        for rung in self.ladder:
            kind = rung.prediction_type or kind
            kinds.append(kind)
        return kinds

    @model_validator(mode="after")
    def _check_ladder(self) -> "RunConfig":
        check_ladder(self.ladder)
        return self
