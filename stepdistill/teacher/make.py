"""Makes the folder of a teacher that is a checkpoint file or a repository on the Hub, or has LoRAs to be merged.

This happens once; from then on it is a teacher's folder like any other.

RUN/teacher/         the pipeline, if a file was read or LoRAs were merged (merging is in float32, whatever the dtype)
RUN/teacher.json     what the teacher was made from, and its folder; written last
"""

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_json, read_sealed, warn_of_damage, whole_folder, write_sealed
from stepdistill.messages import first_line
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.folder import WEIGHTS, teacher_kind
from stepdistill.teacher.loading import loading, local_options
from stepdistill.teacher.lora_trial import check_lora_numbers
from stepdistill.teacher.single_file import file_problems
from stepdistill.teacher.source import (
    TEACHER_RECORD,
    UNET_PREFIX,
    check_teacher_folder,
    is_ready_made,
    local_folder,
    made_folder,
    teacher_lora_file,
    teacher_source,
)

logger = logging.getLogger(__name__)
_SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def make_teacher(config: RunConfig) -> Path:
    """The teacher's folder, made if it does not exist yet; ConfigError for a file or LoRA that cannot be used."""
    if is_ready_made(config):
        return _examined(local_folder(config.teacher.path))
    record = config.run_dir / TEACHER_RECORD
    made = made_folder(config)
    if made is not None:
        return made
    if record.exists() and read_sealed(record) is None:
        warn_of_damage(record, "the teacher's folder is made again")
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    if kind == "hub" and not config.teacher.loras:
        folder = _downloaded(config)
        check_teacher_folder(config, folder)
        write_sealed(record, {"teacher": teacher_source(config), "folder": str(_examined(folder).resolve())})
        return folder
    logger.info("prepare: making the teacher's folder from %s", path)
    pipeline = _of_file(config) if kind == "file" else _of_folder(config)
    dtype = pipeline.unet.dtype
    if config.teacher.loras:
        _bake(pipeline, config)
    folder = config.run_dir / "teacher"
    with whole_folder(folder) as partial:
        pipeline.to(dtype).save_pretrained(partial, safe_serialization=True)
    check_teacher_folder(config, folder)
    _examined(folder)
    write_sealed(record, {"teacher": teacher_source(config), "folder": "teacher"})
    return folder


def _examined(folder: Path) -> Path:
    """The folder itself; ConfigError if parts cannot be loaded, do not fit together or hold numbers that are not finite."""
    problems = list(examine_pipeline(folder))
    if problems:
        raise ConfigError(f"teacher.path: {'; '.join(problems)}")
    return folder


def _downloaded(config: RunConfig) -> Path:
    teacher = config.teacher
    try:
        folder = DiffusionPipeline.download(
            teacher.path,
            revision=teacher.revision,
            variant=teacher.variant,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the Hub's client raises many kinds of errors, each with its reason
        raise ConfigError(
            f"teacher.path: cannot get {teacher.path!r} from the Hub: {first_line(error)}; "
            f"allowed: a repository that is in its cache or can be reached, or a folder on this disk"
        ) from None
    return Path(folder)


def _of_folder(config: RunConfig) -> DiffusionPipeline:
    path = config.teacher.path
    folder = _downloaded(config) if teacher_kind(path) == "hub" else local_folder(path)
    check_teacher_folder(config, folder)
    with loading("teacher.path", folder):
        return DiffusionPipeline.from_pretrained(_examined(folder), **local_options(folder))


def _of_file(config: RunConfig) -> DiffusionPipeline:
    """The pipeline that diffusers reads from a checkpoint in the original layout, in the dtype of its U-Net's weights."""
    file, configs = Path(config.teacher.path).expanduser(), config.teacher.config
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
            dtype = opened.get_tensor(min(key for key in keys if key.startswith(UNET_PREFIX))).dtype
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"teacher.path: cannot read {file} as safetensors: {error}") from None
    pipeline_class: type[Any] = StableDiffusionXLPipeline if _SDXL_KEY in keys else StableDiffusionPipeline
    options: dict[str, Any] = {} if configs is None else {"config": configs}
    if configs is not None and Path(configs).expanduser().is_dir():
        folder = Path(configs).expanduser()
        named = (read_json(folder / "model_index.json") or {}).get("_class_name", "")
        options = {"config": str(folder), "local_files_only": True}
        pipeline_class = getattr(diffusers, named, pipeline_class)
        problems = list(examine_pipeline(folder, file))
        if problems:
            raise ConfigError(f"teacher.path: {'; '.join(problems)}")
    try:
        pipeline = pipeline_class.from_single_file(str(file), torch_dtype=dtype, **options)
        _check_complete(pipeline, file)
        return pipeline
    except Exception as error:  # a missing config, keys of another layout, shapes that do not fit
        raise ConfigError(
            f"teacher.path: cannot read {file} as a {pipeline_class.__name__}: {first_line(error)}; "
            f"teacher.config names the folder or repository whose configs belong to it"
        ) from None


def _check_complete(pipeline: DiffusionPipeline, file: Path) -> None:
    """ValueError if the file lacked weights, which diffusers then leaves without data, or holds some that it left out."""
    nets = {name: part for name, part in pipeline.components.items() if name in WEIGHTS}
    for problem in file_problems(file, nets):
        raise ValueError(problem)


def _bake(pipeline: DiffusionPipeline, config: RunConfig) -> None:
    """Merges the LoRAs, each with its weight, into U-Net and text encoders."""
    pipeline.to(torch.float32)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    names = []
    for number, lora in enumerate(config.teacher.loras):
        file = teacher_lora_file(lora.path)
        names.append(f"teacher_{number}")
        with loading(f"teacher.loras.{number}.path", file):
            check_lora_numbers(file)
            pipeline.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=names[-1], use_safetensors=True
            )
        if names[-1] not in {name for part in pipeline.get_list_adapters().values() for name in part}:
            raise ConfigError(f"teacher.loras.{number}.path: {file} changes no layer of this model")
    pipeline.set_adapters(names, [lora.weight for lora in config.teacher.loras])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    if before.keys() != after.keys() or all(bool((before[k] == after[k]).all()) for k in before):
        raise ConfigError(
            f"teacher.loras: {[lora.path for lora in config.teacher.loras]} leave the U-Net unchanged"
        )
