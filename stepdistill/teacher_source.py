"""Where the teacher is: the folder that `teacher.path` names or leads to, and whether it can be distilled. No torch."""

from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.durable import read_json
from stepdistill.ladder_checks import check_ladder
from stepdistill.models.folder import (
    DEFAULT_TIMESTEPS,
    EMBEDDED_TEACHER,
    embedded_folder,
    missing_parts,
    num_train_timesteps,
    teacher_kind,
    unsupported,
)

TEACHER_RECORD = "teacher.json"


def check_teacher(config: RunConfig) -> None:
    """ConfigError for a teacher that cannot be used, as far as the disk tells without reading weights."""
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    for number, lora in enumerate(config.teacher.loras):
        if not Path(lora.path).expanduser().exists():
            raise ConfigError(f"teacher.loras.{number}.path: got {lora.path!r}, which is not there")
    if kind == "file" and Path(path).suffix != ".safetensors":
        raise ConfigError(
            f"teacher.path: got {path!r}; allowed: .safetensors; files of the other kinds run code when they are read"
        )
    if kind == "file" and not Path(path).expanduser().is_file():
        raise ConfigError(f"teacher.path: got {path!r}, which is not there")
    if kind == "folder":
        check_teacher_folder(config, local_folder(path))


def check_teacher_folder(config: RunConfig, folder: Path) -> None:
    """ConfigError where a pipeline's folder is incomplete, or something that this trainer cannot distil."""
    path, missing = config.teacher.path, missing_parts(folder)
    if missing:
        raise ConfigError(
            f"teacher.path: got {path!r}, which lacks {'; '.join(missing)}; "
            f"allowed: a complete diffusers pipeline folder in safetensors, a .safetensors file, a repository of "
            f'the Hub, or "{EMBEDDED_TEACHER}"'
        )
    odd = unsupported(folder)
    if odd:
        raise ConfigError(f"teacher.path: got {path!r}, which has {'; '.join(odd)}")
    check_ladder(config, folder)


def local_folder(path: str) -> Path:
    """The pipeline's folder that a `teacher.path` of that kind names."""
    return embedded_folder("teacher") if path == EMBEDDED_TEACHER else Path(path).expanduser()


def teacher_folder(config: RunConfig) -> Path:
    """The pipeline's folder that everything reads: the user's own, or the one that `prepare` made of a file, a repository,
    or a teacher with LoRAs (models/teacher.py); ConfigError where it is not there yet."""
    if is_ready_made(config):
        return local_folder(config.teacher.path)
    record = read_json(config.run_dir / TEACHER_RECORD)
    if record is None or record.get("teacher") != teacher_source(config):
        raise ConfigError(
            f"{config.run_dir} has no teacher made of {config.teacher.path!r} yet: run `stepdistill prepare` first"
        )
    return config.run_dir / record["folder"]


def teacher_timesteps(config: RunConfig) -> int:
    """How many timesteps the teacher was trained on; 1000 where its folder is not there yet."""
    try:
        return num_train_timesteps(teacher_folder(config))
    except ConfigError:
        return DEFAULT_TIMESTEPS


def is_ready_made(config: RunConfig) -> bool:
    """Whether the teacher is a folder on this disk as it is."""
    return teacher_kind(config.teacher.path) == "folder" and not config.teacher.loras


def teacher_source(config: RunConfig) -> dict[str, Any]:
    """What a teacher is made of."""
    return config.teacher.model_dump(mode="json", exclude={"guidance_scale", "unconditional"})
