"""The rows of the evaluation table: which model draws, in how many steps, with which LoRA, scheduler and guidance scale."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from stepdistill.config import ConfigError, LoraRow, RunConfig
from stepdistill.diffusion.grid import passes_per_step
from stepdistill.disk.durable import read_json
from stepdistill.export.exported import scheduler_file
from stepdistill.messages import first_line
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from stepdistill.teacher.files import read_header
from stepdistill.teacher.lora_header import check_lora_header
from stepdistill.teacher.scheduler import MAX_TIMESTEPS, is_flow_scheduler

ONNX_FILES = {"float32": "onnx/unet.onnx", "int8": "onnx-int8/unet.onnx"}
"""Files of a rung's folder that onnxruntime draws with, by precision."""


@dataclass(frozen=True)
class Row:
    """One way to draw images: with the LoRA of rung `student_steps`, with another LoRA (`lora`), or with the undistilled
    teacher if both are None."""

    name: str
    steps: int
    guidance_scale: float
    student_steps: int | None = None
    lora: LoraRow | None = None
    lora_scale: float = 1.0
    onnx: str | None = None
    """The precision of the exported U-Net that onnxruntime draws with; None: the torch pipeline with the LoRA."""
    expert: int | None = None
    """The number of the one of several teachers that draws; None: for each prompt the one with the largest weight."""
    is_base: bool = False
    """Whether the model that LoRAs are trained on draws, where that is not the teacher."""

    @property
    def kind(self) -> str:
        """Which kind of model draws: "teacher", "student", or "lora" for what the ladder did not train as it is drawn."""
        if self.lora is not None or self.onnx is not None or self.expert is not None or self.is_base:
            return "lora"
        return "teacher" if self.student_steps is None else "student"

    @property
    def nfe(self) -> int:
        """Number of U-Net evaluations per image: two per step with classifier-free guidance, else one."""
        return self.steps * passes_per_step(self.guidance_scale)

    def weights(self, run_dir: Path) -> Path | None:
        """The LoRA's file; None for the teacher."""
        if self.lora is not None:
            return lora_file(self.lora)
        if self.student_steps is None:
            return None
        folder = rung_folder(run_dir, self.student_steps)
        return folder / (WEIGHT_NAME if self.onnx is None else ONNX_FILES[self.onnx])


def rows_of(config: RunConfig) -> list[Row]:
    """The table's rows: the teacher at its step counts, every rung, those of onnxruntime, experts or a smaller base,
    evaluation.loras.

    ConfigError if such a LoRA has no usable file or scheduler.
    """
    teachers = [
        Row(f"teacher-{n}", n, config.teacher.guidance_scale) for n in config.evaluation.teacher_steps
    ]
    teachers += [Row(f"unguided-{n}", n, 1.0) for n in config.evaluation.unguided_steps]
    students = [
        Row(f"student-{r.student_steps}", r.student_steps, 1.0, r.student_steps) for r in config.ladder
    ]
    students += [
        Row(f"student-{r.student_steps}-{precision}", r.student_steps, 1.0, r.student_steps, onnx=precision)
        for r in config.ladder
        for precision in config.evaluation.onnx
    ]
    if config.shrink is not None:  # its one expert is the teacher
        guided = replace(teachers[0], name=f"smaller-base-{teachers[0].steps}", is_base=True)
        return [*teachers, *students, guided, *map(lora_row, config.evaluation.loras)]
    experts = [
        Row(f"expert-{expert.name}-{n}", n, config.teacher.guidance_scale, expert=index)
        for index, expert in enumerate(config.teachers)
        for n in config.evaluation.teacher_steps[:1]
    ]
    return teachers + students + experts + [lora_row(lora) for lora in config.evaluation.loras]


def lora_row(lora: LoraRow) -> Row:
    """The row of a LoRA of evaluation.loras; ConfigError if its file or its scheduler is missing or cannot be used."""
    weights = lora_file(lora)
    if not weights.is_file() or weights.suffix != ".safetensors":
        raise ConfigError(
            f"evaluation.loras: {lora.name}: got path {lora.path!r}; "
            f"allowed: a .safetensors file, or a folder with {WEIGHT_NAME}"
        )
    try:
        header = read_header(weights)
        check_lora_header(weights)
    except ValueError as error:
        raise ConfigError(f"evaluation.loras: {lora.name}: {error}") from None
    if not any("lora" in key.lower() for key in header):
        raise ConfigError(
            f"evaluation.loras: {lora.name}: {weights} holds no LoRA, only {len(header)} other tensors"
        )
    try_scheduler(lora, {})
    return Row(lora.name, lora.steps, lora.guidance_scale, lora=lora, lora_scale=lora.scale)


def lora_file(lora: LoraRow) -> Path:
    """The safetensors file of a LoRA, whose path may be the file or its folder."""
    path = Path(lora.path)
    return path / WEIGHT_NAME if path.is_dir() else path


def lora_scheduler(lora: LoraRow, base_config: Mapping[str, Any]) -> SchedulerMixin:
    """The scheduler that samples with a LoRA, changed by its scheduler_options.

    The class that `lora.scheduler` names, built from the base model's scheduler config; if it names none, the scheduler in
    scheduler/ beside the weights; if there is none, DDIM from the base model's config. ConfigError if the class is not one
    of diffusers, or the file beside the weights is damaged. On a flow, Euler takes the place of DDIM.
    """
    file = scheduler_file(lora_file(lora).parent)
    if lora.scheduler is None and file.exists():
        beside = read_json(file)
        if not isinstance(beside, dict):
            raise ConfigError(
                f"evaluation.loras: {lora.name}: {file} is damaged; fix: copy it again, or set `scheduler`"
            )
        kind = scheduler_class(str(beside.get("_class_name")))
        return kind.from_config(beside, **(lora.scheduler_options or {}))
    plain = "DDIMScheduler", {"timestep_spacing": "trailing"}
    if is_flow_scheduler(base_config):
        plain = str(base_config["_class_name"]), {}
    options = plain[1] if lora.scheduler_options is None else lora.scheduler_options
    return scheduler_class(lora.scheduler or plain[0]).from_config(dict(base_config), **options)


def try_scheduler(lora: LoraRow, base_config: Mapping[str, Any]) -> None:
    """ConfigError if the scheduler cannot be built with its options, or cannot give the timesteps of the row.

    base_config: the base model's scheduler config; {} if it is not known.
    """
    beside = read_json(scheduler_file(lora_file(lora).parent)) if lora.scheduler is None else None
    options = {**(beside if isinstance(beside, dict) else {}), **(lora.scheduler_options or {})}
    count = options.get("num_train_timesteps", 1)
    if type(count) is not int or not 1 <= count <= MAX_TIMESTEPS:
        raise ConfigError(
            f"evaluation.loras: {lora.name}: got num_train_timesteps {count!r}; allowed: 1 to {MAX_TIMESTEPS}"
        )
    try:
        scheduler = lora_scheduler(lora, base_config)
        unknown = sorted((lora.scheduler_options or {}).keys() - scheduler.config.keys())
        if unknown:
            raise ValueError(f"{type(scheduler).__name__} has no option {unknown[0]}")
        steps_on_flows = is_flow_scheduler({"_class_name": type(scheduler).__name__})
        if is_flow_scheduler(base_config) and not (steps_on_flows or scheduler.config.get("use_flow_sigmas")):
            raise ValueError(f"{type(scheduler).__name__} does not step on the base model's flow")
        if lora.timesteps is not None and len(lora.timesteps) != lora.steps:
            raise ValueError(f"it has {len(lora.timesteps)} timesteps")
        if lora.timesteps is not None:
            _require_own_timesteps(scheduler)
            scheduler.set_timesteps(timesteps=list(lora.timesteps))
        else:
            scheduler.set_timesteps(lora.steps)
        times = scheduler.timesteps
        last = scheduler.config.num_train_timesteps - (not steps_on_flows)
        within = bool(((times >= 0) & (times <= last)).all())
        if not within:
            raise ValueError(f"timesteps from {times.min():g} to {times.max():g}")
    except ConfigError:
        raise
    except Exception as error:  # diffusers' schedulers raise many types of errors for bad options
        raise ConfigError(
            f"evaluation.loras: {lora.name}: its scheduler cannot sample in {lora.steps} steps: {first_line(error)}; "
            f"allowed: a scheduler of diffusers with options that it takes"
        ) from None


def _require_own_timesteps(scheduler: SchedulerMixin) -> None:
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{type(scheduler).__name__} does not accept custom timesteps")


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler class of that name; ConfigError if there is none."""
    scheduler_type = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(scheduler_type, type) and issubclass(scheduler_type, SchedulerMixin)):
        raise ConfigError(
            f"evaluation.loras: got scheduler {name!r}; allowed: a class of diffusers, such as LCMScheduler, "
            f"EulerDiscreteScheduler, DDIMScheduler, TCDScheduler"
        )
    return scheduler_type
