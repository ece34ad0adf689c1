"""What one YAML file says of a run: frozen sections, every field documented, the ladder checked. No torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ConfigError(ValueError):
    """A config that cannot run; the message names the key, the value got and what is allowed."""


class Section(BaseModel):
    """Base of all sections: frozen, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Teacher(Section):
    """The model to distil."""

    path: str = "letters"
    """A complete diffusers pipeline folder, or "letters" for the one that ships in the package."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """Classifier-free guidance of the first rung's teacher and of the teacher's rows in the table; 1 is off."""


class Lora(Section):
    """What trains."""

    rank: PositiveInt = 32
    """Rank of every rung's LoRA; alpha equals it."""


class Data(Section):
    """What noise is added to."""

    source: str = "letters"
    """Renderings of the letters world, or a folder of pictures, each with its caption in a .txt file beside it."""
    num_images: PositiveInt = 4096
    """How many pictures go into the cache: so many are rendered, of a folder the first so many."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the captions that distillation does not see; the table is then about these alone."""


class Training(Section):
    """How every phase is optimised, unless the phase says otherwise."""

    train_batch_size: PositiveInt = 32
    """Samples per micro-batch and process."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per update; what an update computes does not depend on the split."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm, student and discriminator each."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Updates of linear warm-up at the start of each phase."""
    lr_final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The learning rate decays along a cosine to this share of itself."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the student's moving average, which is then what a phase leaves; 0 keeps the last weights."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: the base in bfloat16 under autocast; masters of what trains stay float32."""
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


class DiscriminatorOptions(Section):
    """The adversary of `paired` and `single` phases."""

    trunk: Literal["lora", "full", "frozen"] = "lora"
    """Encoder and mid-block: the base with an adapter, a copy trained whole, or the base as it is."""
    heads: Literal["mid", "multi"] = "mid"
    """A head on the mid-block, or there and on every down block."""
    loss: Literal["non_saturating", "relativistic"] = "non_saturating"
    """Each sample judged alone (the paper's form), or each teacher sample against its student's."""
    real: Literal["teacher", "data"] = "teacher"
    """What D takes for real: the teacher's x_s (the paper's form), or the data noised to s, which needs no teacher."""
    learning_rate: PositiveFloat | None = None
    """Of trunk and heads; the phase's own where not given."""
    inputs: Literal["data", "student"] = "data"
    """Where the student's x_t come from: noised data, or its own roll-out from noise (DMD2's backward simulation)."""
    r1_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the approximate R1 and R2: (D(x + .05 n) - D(x))^2 on real and fake, n unit noise (APT, arXiv 2501.08316)."""
    perturbation_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """How often a clean sample is re-noised to t* = 10, 250, 500, 750 before D sees it; later 5:1:1:1."""


class Phase(Section):
    """One objective inside a rung."""

    objective: Literal["mse", "convert", "paired", "single"]
    """mse to the teacher; convert to x0 output; adversarial with D told x_t (paired) or not (single)."""
    max_train_steps: PositiveInt = 100
    """Updates."""
    learning_rate: PositiveFloat = 1e-3
    """Of the student's LoRA, after warm-up."""
    teacher_steps: PositiveInt | None = None
    """Another rung of this ladder as teacher (skip-level); the rung's own where not given."""
    loss_space: Literal["prev_sample", "epsilon", "sample", "v_prediction", "truncated_snr"] = "prev_sample"
    """Where mse is measured."""
    cached_updates: PositiveInt | None = None
    """Of mse: the batches and teacher's samples of so many updates are kept and used again in turn; all new if not given."""
    stop_at_gain: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of mse: over where 20 updates lower the loss at unseen noise by less than this share; never early if not given."""
    discriminator: DiscriminatorOptions = DiscriminatorOptions()
    """Of paired and single phases."""


class Rung(Section):
    """One step reduction."""

    teacher_steps: PositiveInt
    """Steps of the teacher: 128 of the base model for the first rung, the student before after that."""
    student_steps: PositiveInt
    """Steps of the student that this rung makes; on the first rung as many as the teacher's teach guidance alone."""
    node_steps: PositiveInt | None = None
    """The grid whose nodes the student is trained at; its own where not given (recipe: 4 for the 2- and 1-step rungs)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the student predicts; as the rung before where not given. The 1-step rung converts to "sample" (x0)."""
    start_timestep: Annotated[int, Field(gt=0, lt=1000)] | None = None
    """Of the 1-step rung: the timestep that the U-Net is told with the pure noise; its last one where not given. Earlier,
    an error of epsilon weighs far less in the picture: 1.6-fold at 499, 14.6-fold at 999 of Stable Diffusion's schedule."""
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """In order."""


class Preview(Section):
    """Pictures while training."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Fixed prompts, drawn from fixed noise by teacher and student."""


class LoraRow(Section):
    """A row for any other LoRA of the same base: one of the field's, or another run's."""

    name: Name
    """The row's name."""
    path: str
    """A safetensors file, or a folder with pytorch_lora_weights.safetensors."""
    steps: PositiveInt
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
    timesteps: tuple[int, ...] | None = None
    """Explicit timesteps, such as DMD2's 999, 749, 499, 249; the scheduler's own where not given."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the schedulers that know it (DDIM, TCD)."""


class Evaluation(Section):
    """The table: what is drawn and what is measured."""

    num_images: Annotated[int, Field(ge=8)] = 500
    """Images per row."""
    prompts: str | None = None
    """A text file, one prompt a line, used in order and again from the start; the captions of `data` where not given."""
    real_images: str | None = None
    """A folder of pictures that `*_to_real` compares with; where not given the pictures of `data`, letters fresh."""
    reference_stats: str | None = None
    """An .npz with mu and sigma of real images under the same extractor and resize, for `fid_to_real` without pictures."""
    teacher_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 8, 4, 2, 1)
    """Rows of the undistilled teacher; the first is the reference of `*_to_teacher`."""
    unguided_steps: tuple[PositiveInt, ...] = ()
    """Rows of the undistilled teacher without guidance: as many passes as a student, often nearer to real images."""
    loras: tuple[LoraRow, ...] = ()
    """Rows of other LoRAs."""
    batch_size: PositiveInt = 64
    """Images per pipeline call."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the pipeline draws in."""
    features: str = "reader"
    """What FID, KID, precision and coverage are measured on: reader, inception[:FILE], clip:FOLDER or dinov2:FOLDER."""
    resize: Literal["none", "torchmetrics", "tf1", "pil_bicubic", "lanczos512"] | None = None
    """How images reach the extractor's size; where not given none (reader), torchmetrics (inception), else pil_bicubic."""
    patch_size: PositiveInt | None = None
    """Patch FID on the centre crop of this size, without resize (299 for Inception); off where not given."""
    clip: str | None = None
    """A CLIP folder: CLIP score and CMMD."""
    dinov2: str | None = None
    """A DINOv2 folder: FD-DINOv2."""
    floor: bool = True
    """Draw the teacher once more with other seeds: the distance that no student can be held to."""
    diversity_prompts: Annotated[int, Field(ge=0)] = 8
    """How many prompts are drawn with several seeds each; 0 leaves diversity out."""
    diversity_seeds: Annotated[int, Field(ge=2)] = 8
    """Seeds per prompt."""
    lora_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    """Every rung's LoRA at these weights on a few images; () leaves the sweep out."""
    matrix: bool = True
    """Every rung's LoRA sampled at every rung's steps on a few images."""
    study_images: PositiveInt = 8
    """Images per cell of the sweep and the matrix."""
    cost_batch_sizes: tuple[PositiveInt, ...] = (1, 8, 32)
    """Batches that seconds, images/s and memory are measured at; () leaves cost out."""
    score_cmd: str | None = None
    """An outside scorer: a command with {images} (a folder) and {prompts} (a file); its last line is a JSON object."""
    grid_columns: PositiveInt = 10
    """Prompts in the picture."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        names, kept = [lora.name for lora in self.loras], ("teacher-", "student-", "unguided-")
        taken = sorted({n for n in names if names.count(n) > 1 or n.startswith(kept)})
        if taken:
            raise ConfigError(
                f"evaluation.loras: got the name {taken[0]!r}; allowed: names of their own, "
                "not teacher-N, student-N or unguided-N"
            )
        return self


class RunConfig(Section):
    """A whole run."""

    name: Name
    """The run's folder is output_dir/name."""
    output_dir: str = "runs"
    """Where run folders are."""
    seed: int = 0
    """Everything random is derived from it."""
    teacher: Teacher = Teacher()
    lora: Lora = Lora()
    data: Data = Data()
    training: Training = Training()
    ladder: Annotated[tuple[Rung, ...], Field(min_length=1)]
    preview: Preview
    evaluation: Evaluation = Evaluation()

    @property
    def run_dir(self) -> Path:
        """output_dir/name."""
        return Path(self.output_dir) / self.name

    @model_validator(mode="after")
    def _check_ladder(self) -> "RunConfig":
        for index, rung in enumerate(self.ladder):
            _check_rung(index, self.ladder)
            for number, phase in enumerate(rung.phases):
                _check_phase(f"ladder.{index}.phases.{number}", phase, rung, self.ladder[:index])
        return self


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n) if n % k == 0]


def _check_rung(index: int, ladder: tuple[Rung, ...]) -> None:
    rung, key = ladder[index], f"ladder.{index}"
    allowed = _divisors(rung.teacher_steps) + ([] if index else [rung.teacher_steps])
    if rung.student_steps not in allowed:
        nearest = min(allowed, key=lambda n: abs(n - rung.student_steps), default=1)
        raise ConfigError(
            f"{key}.student_steps: got {rung.student_steps}; {rung.teacher_steps} teacher steps do not divide into it; "
            f"allowed: {', '.join(map(str, allowed))}; nearest: {nearest}"
        )
    if index and rung.teacher_steps != ladder[index - 1].student_steps:
        raise ConfigError(
            f"{key}.teacher_steps: got {rung.teacher_steps}; allowed: {ladder[index - 1].student_steps}, "
            f"the student of the rung before"
        )
    if rung.node_steps is not None and rung.node_steps % rung.student_steps:
        raise ConfigError(
            f"{key}.node_steps: got {rung.node_steps}; allowed: multiples of student_steps {rung.student_steps}"
        )
    if rung.start_timestep is not None and (rung.student_steps, rung.node_steps or 1) != (1, 1):
        raise ConfigError(
            f"{key}.start_timestep: got {rung.start_timestep}; allowed: on a rung of 1 student step, without node_steps"
        )


def _check_phase(key: str, phase: Phase, rung: Rung, earlier: tuple[Rung, ...]) -> None:
    known = [r.student_steps for r in earlier if r.student_steps % rung.student_steps == 0] or [
        rung.teacher_steps
    ]
    if phase.teacher_steps is not None and phase.teacher_steps not in known:
        raise ConfigError(
            f"{key}.teacher_steps: got {phase.teacher_steps}; allowed: {', '.join(map(str, known))}, "
            f"the students of earlier rungs"
        )
    for option in ("cached_updates", "stop_at_gain"):
        if phase.objective != "mse" and getattr(phase, option) is not None:
            raise ConfigError(
                f"{key}.{option}: got {getattr(phase, option)}; allowed: on an mse phase, this is {phase.objective}"
            )
    if phase.discriminator.inputs == "student" and rung.node_steps not in (None, rung.student_steps):
        raise ConfigError(
            f'{key}.discriminator.inputs: got "student"; allowed: without node_steps, as a roll-out goes along the '
            f"student's own nodes"
        )
    if phase.objective == "convert" and rung.prediction_type != "sample":
        raise ConfigError(
            f'{key}.objective: got "convert"; it needs prediction_type: sample on its rung, got {rung.prediction_type}'
        )
