"""Which of several teachers a prompt belongs to (`teachers`). No torch."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, Expert, RunConfig
from stepdistill.disk.durable import sha256_file, sha256_json
from stepdistill.run.rungs import WEIGHT_NAME
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.fingerprints import TEXT_ENCODERS, network_fingerprint, weights_fingerprint
from stepdistill.teacher.scheduler import DYNAMIC_SHIFT


@functools.lru_cache(maxsize=2**16)
def shares_of(teachers: tuple[Expert, ...], prompt: str) -> tuple[float, ...]:
    """The weight of each teacher for a prompt; they sum to 1. ConfigError if none has it."""
    weights = [teacher.weight if is_of(teacher, prompt) else 0.0 for teacher in teachers]
    if not any(weights):
        patterns = ", ".join(repr(teacher.prompts) for teacher in teachers)
        raise ConfigError(
            f"teachers: no teacher's prompts ({patterns}) match {prompt!r}; fix: a pattern that does, or one teacher "
            f"without prompts"
        )
    return tuple(weight / sum(weights) for weight in weights)


def is_of(teacher: Expert, prompt: str) -> bool:
    """Whether a prompt is one of those that a teacher is asked for."""
    return teacher.prompts is None or re.search(teacher.prompts, prompt, re.IGNORECASE) is not None


def main_expert(teachers: tuple[Expert, ...], prompt: str) -> int:
    """The number of the teacher with the largest weight for a prompt, the first of those."""
    shares = shares_of(teachers, prompt)
    return shares.index(max(shares))


def check_prompts(teachers: tuple[Expert, ...], prompts: Iterable[str]) -> None:
    """ConfigError if one of the prompts has no teacher."""
    if teachers:
        for prompt in prompts:
            shares_of(teachers, prompt)


def lora_files(teacher: Expert) -> list[Path]:
    """The files of a teacher's LoRAs."""
    paths = [Path(lora.path).expanduser() for lora in teacher.loras]
    return [path / WEIGHT_NAME if path.is_dir() else path for path in paths]


def teachers_key(config: RunConfig) -> str | None:
    """A hash of the weights and patterns of all teachers; None if there is only the model at teacher.path."""
    if not config.teachers:
        return None
    about = []
    for teacher in config.teachers:
        files = [sha256_file(file) for file in lora_files(teacher) if file.is_file()]
        own = None if teacher.path is None else network_fingerprint(Path(teacher.path).expanduser())
        settings = teacher.model_dump(
            mode="json", exclude={"name": True, "path": True, "loras": {"__all__": {"path"}}}
        )
        about.append([settings, files, own])
    return sha256_json(about)


def check_files(config: RunConfig, facts: TeacherFacts) -> None:
    """ConfigError if a teacher's LoRA is missing, or its folder is no pipeline that can be asked like teacher.path."""
    for index, teacher in enumerate(config.teachers):
        for place, file in enumerate(lora_files(teacher)):
            if not file.is_file():
                raise ConfigError(
                    f"teachers.{index}.loras.{place}.path: got {teacher.loras[place].path!r}, but there is no file {file}; "
                    f"allowed: a .safetensors file, or a folder with {WEIGHT_NAME}"
                )
        if teacher.path is not None:
            is_smaller = config.shrink is not None
            _check_folder(
                f"teachers.{index}.path", Path(teacher.path).expanduser(), facts, is_smaller=is_smaller
            )


def _check_folder(key: str, folder: Path, facts: TeacherFacts, *, is_smaller: bool = False) -> None:
    """is_smaller: the model that is trained was made of this one, so its U-Net may have fewer blocks."""
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{key}: got {str(folder)!r}, which holds no pipeline; allowed: a pipeline's folder"
        )
    other = TeacherFacts.of_folder(folder)
    network = "a U-Net" if facts.network_part == "unet" else "a transformer"
    compared: dict[str, list[dict[str, Any]]] = {
        network: [{k: v for k, v in f.network.items() if not k.startswith("_")} for f in (facts, other)],
        "a prediction type": [{"prediction_type": f.prediction_type} for f in (facts, other)],
        "a noise schedule": [{k: f.scheduler.get(k) for k in _SCHEDULE} for f in (facts, other)],
        "text encoders": [{"weights": weights_fingerprint(f.folder, *TEXT_ENCODERS)} for f in (facts, other)],
    }
    if is_smaller:
        del compared[network]
    for what, (ours, theirs) in compared.items():
        if ours != theirs:
            name = next(k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k))
            raise ConfigError(
                f"{key}: got {str(folder)!r}, with {what} other than teacher.path has ({name} {theirs.get(name)}, not "
                f"{ours.get(name)}); allowed: a fine-tune of the same model, whose text encoders were not trained"
            )


_SCHEDULE = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
    "shift",
    "use_dynamic_shifting",
    "time_shift_type",
    *DYNAMIC_SHIFT,
)
