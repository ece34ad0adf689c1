"""Finds the teacher's folder, which `teacher.path` names or leads to, and checks that it can be distilled. No torch."""

from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_sealed
from stepdistill.disk.places import is_folder
from stepdistill.run.folder import TEACHER_RECORD
from stepdistill.teacher.facts import DEFAULT_TIMESTEPS, TeacherFacts
from stepdistill.teacher.files import read_header
from stepdistill.teacher.folder import (
    EMBEDDED,
    broken_files,
    embedded_folder,
    missing_parts,
    teacher_kind,
    unsupported,
)
from stepdistill.teacher.ladder_fit import check_ladder_fits
from stepdistill.teacher.layouts import base_of_distilled
from stepdistill.teacher.lora_header import check_lora_header

UNET_PREFIX = "model.diffusion_model."
"""Prefix of the U-Net's keys in a checkpoint in the original layout."""
_OF_TRANSFORMERS = ("joint_blocks.", "cap_embedder.")
"""How keys of SD3's and Z-Image's transformers begin there."""
LORA_NAME = "pytorch_lora_weights.safetensors"
_SHIPPED = " or ".join(f'"{name}"' for name in EMBEDDED)


def check_teacher(config: RunConfig) -> None:
    """ConfigError for a teacher that cannot be used, as far as this is visible without reading weights."""
    try:
        _check_teacher(config)
    except OSError as error:
        raise ConfigError(f"teacher: cannot access {error.filename}: {error.strerror}") from None


def _check_teacher(config: RunConfig) -> None:
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    base = base_of_distilled(path)
    if base is not None:
        raise ConfigError(
            f"teacher.path: got {path!r}, which by its name is distilled to few steps already; allowed: a base model, here "
            f"{base}"
        )
    for number, lora in enumerate(config.teacher.loras):
        _check_lora(f"teacher.loras.{number}.path", lora.path)
    if kind == "file" and Path(path).suffix != ".safetensors":
        raise ConfigError(
            f"teacher.path: got {path!r}, which is not a .safetensors file; allowed: a diffusers pipeline folder, or a "
            f".safetensors file, because files of other kinds may run code when they are read"
        )
    if kind == "file":
        _check_file(config)
    if kind == "folder":
        check_teacher_folder(config, local_folder(path))


def _check_file(config: RunConfig) -> None:
    """ConfigError if a single file is not a complete checkpoint, or teacher.config holds no configs of a pipeline."""
    path, configs = Path(config.teacher.path).expanduser(), config.teacher.config
    if not path.exists():
        raise ConfigError(f"teacher.path: got {config.teacher.path!r}, which does not exist")
    try:
        header = read_header(path)
    except ValueError as error:
        raise ConfigError(f"teacher.path: {error}") from None
    folder = None if configs is None else Path(configs).expanduser()
    facts = None if folder is None or not is_folder(folder) else TeacherFacts.of_folder(folder)
    is_transformer = facts is not None and facts.network_part == "transformer"
    names = [key.removeprefix(UNET_PREFIX) for key in header if key.startswith(UNET_PREFIX)]
    is_unet = bool(names) and not any(name.startswith(_OF_TRANSFORMERS) for name in names)
    if not is_transformer and not is_unet:
        raise ConfigError(
            f"teacher.path: {path} holds no whole model (no U-Net among {len(header)} tensors); "
            f"allowed: a checkpoint with U-Net, VAE and text encoders, or a transformer alone, with teacher.config=FOLDER "
            f"of the pipeline's other parts; a LoRA goes into teacher.loras"
        )
    if folder is None or facts is None:
        return
    missing = missing_parts(folder, weights=is_transformer, but_network=True)
    wrong = missing or [*broken_files(folder, header=header), *unsupported(folder)]
    if wrong:
        has = "lacks" if missing else "has"
        raise ConfigError(
            f"teacher.config: got {configs!r}, which {has} {'; '.join(wrong)}; allowed: the configs of the pipeline that "
            f"the file belongs to, and for a transformer the weights of its other parts"
        )


def teacher_lora_file(path: str) -> Path:
    """The .safetensors file that an entry of `teacher.loras` names: the path itself, or the only such file in a folder.

    Of several files, the one called LORA_NAME counts. ValueError if none can be chosen.
    """
    place = Path(path).expanduser()
    if not is_folder(place):
        return place
    files = sorted(place.glob("*.safetensors"))
    named = [file for file in files if file.name == LORA_NAME]
    if len(named or files) != 1:
        raise ValueError(f"{place} holds {len(files)} .safetensors files; allowed: one, or {LORA_NAME}")
    return (named or files)[0]


def _check_lora(key: str, path: str) -> None:
    """ConfigError if a LoRA of the teacher is missing, or its file is broken or holds no LoRA."""
    if not is_folder(Path(path).expanduser()) and not Path(path).expanduser().exists():
        raise ConfigError(f"{key}: got {path!r}, which does not exist")
    try:
        file = teacher_lora_file(path)
        if file.suffix != ".safetensors":
            raise ValueError(
                f"got {path!r}; allowed: .safetensors; files of the other kinds run code when they are read"
            )
        header = read_header(file)
        check_lora_header(file)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not any("lora" in name.lower() for name in header):
        raise ConfigError(f"{key}: {file} holds no LoRA ({len(header)} tensors, none with lora in its name)")


def check_teacher_folder(config: RunConfig, folder: Path) -> None:
    """ConfigError if a pipeline's folder is incomplete or broken, or holds what this trainer or its ladder cannot distil."""
    path, missing = config.teacher.path, missing_parts(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"teacher.path: got {path!r}, but there is no folder at {folder.absolute()}; allowed: a diffusers pipeline "
            f"folder, a .safetensors file, a repository of the Hub, or {_SHIPPED}"
        )
    if missing:
        raise ConfigError(
            f"teacher.path: got {path!r}, which lacks {'; '.join(missing)}; "
            f"allowed: a complete diffusers pipeline folder in safetensors, a .safetensors file, a repository of "
            f"the Hub, or {_SHIPPED}"
        )
    broken = [*broken_files(folder)]
    if broken:
        raise ConfigError(
            f"teacher.path: got {path!r}, which is broken: {'; '.join(broken)}; fix: copy it again"
        )
    odd = unsupported(folder)
    if odd:
        raise ConfigError(f"teacher.path: got {path!r}, which has {'; '.join(odd)}")
    check_ladder_fits(config, TeacherFacts.of_folder(folder))


def local_folder(path: str) -> Path:
    """The pipeline's folder that `teacher.path` names, if its teacher_kind is "folder"."""
    return embedded_folder(EMBEDDED[path]) if path in EMBEDDED else Path(path).expanduser()


def teacher_folder(config: RunConfig) -> Path:
    """The pipeline's folder that all stages read; ConfigError if it does not exist yet.

    It is the user's own folder, or the one that `prepare` made from a file, a repository, or a teacher with LoRAs
    (teacher/make.py).
    """
    if is_ready_made(config):
        return local_folder(config.teacher.path)
    folder = made_folder(config)
    if folder is None:
        raise ConfigError(
            f"{config.run_dir} has no teacher made from {config.teacher.path!r} yet, or {TEACHER_RECORD} is damaged: "
            f"run `stepdistill prepare` first"
        )
    return folder


def configs_folder(config: RunConfig) -> Path:
    """A folder with the teacher's configs, with or without its weights.

    With it, whatever depends on the configs alone is known before `prepare` has made the folder of a file, of a repository,
    or of a teacher with LoRAs. It is the pipeline's folder if that exists, else a repository's copy in the Hub's cache, else
    the teacher.config of a file. ConfigError if none of them is on this disk.
    """
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    if kind == "folder":
        return local_folder(path)
    folder = made_folder(config)
    if folder is None and kind == "file" and config.teacher.config is not None:
        folder = Path(config.teacher.config).expanduser()
        folder = folder if is_folder(folder) else cached_repository(config.teacher.config, None)
    if folder is None and kind == "hub":
        folder = cached_repository(path, config.teacher.revision)
    if folder is None or missing_parts(folder, weights=False):
        raise ConfigError(
            f"teacher: the configs of {path!r} are not on this disk; allowed: `stepdistill prepare` first"
            f"{', or teacher.config=FOLDER' if kind == 'file' else ''}"
        )
    return folder


def teacher_facts(config: RunConfig) -> TeacherFacts:
    """What the teacher's configs say; ConfigError if they are not on this disk."""
    folder = configs_folder(config)
    if not is_folder(folder):
        raise ConfigError(
            f"teacher.path: got {config.teacher.path!r}, but there is no folder at {folder.absolute()}"
        )
    return TeacherFacts.of_folder(folder)


def cached_repository(path: str, revision: str | None) -> Path | None:
    """A repository's copy in the Hub's cache, None if there is none; ConfigError if path cannot be a repository's name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(path, "model_index.json", revision=revision)
    except HFValidationError as error:
        raise ConfigError(
            f"teacher.path: got {path!r}, which is not a repository of the Hub: {error}"
        ) from None
    return Path(index).parent if isinstance(index, str) else None


def made_folder(config: RunConfig) -> Path | None:
    """The folder that `prepare` made from this config's teacher, according to teacher.json.

    None if teacher.json is missing, damaged or about another teacher, or if the folder is gone.
    """
    record = read_sealed(config.run_dir / TEACHER_RECORD)
    if record is None or record.get("teacher") != teacher_source(config):
        return None
    named = record.get("folder")
    folder = config.run_dir / named if isinstance(named, str) else None
    return folder if folder is not None and folder.is_dir() else None


def teacher_timesteps(config: RunConfig) -> int:
    """The number of timesteps that the teacher was trained on; 1000 if its configs are not on this disk yet."""
    try:
        return teacher_facts(config).num_train_timesteps
    except ConfigError:
        return DEFAULT_TIMESTEPS


def is_ready_made(config: RunConfig) -> bool:
    """Whether the teacher is a folder on this disk that can be used as it is."""
    return teacher_kind(config.teacher.path) == "folder" and not config.teacher.loras


def teacher_source(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the teacher's weights and configs, as plain data."""
    return config.teacher.model_dump(mode="json", exclude={"guidance_scale", "unconditional"})
