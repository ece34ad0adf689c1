"""Where a run's smaller base model is, and the config with which the ladder climbs on it. No torch.

RUN/shrink/                 the sensitivity table, previews, log and checkpoints of its training
RUN/base/                   the finished pipeline: the smaller U-Net, and all else of the teacher
RUN/base/stepdistill.json   what was removed, the number of parameters, how long it was trained; written with the folder
"""

from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, Expert, RunConfig, Teacher
from stepdistill.disk.durable import read_sealed
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.source import teacher_folder
from stepdistill.teacher.unet_parts import smaller_config

RECORD = "stepdistill.json"
ORIGINAL = "original"
"""The name of the teacher's rows in the table."""


def work_folder(config: RunConfig) -> Path:
    """Where the training of the smaller base leaves its files."""
    return config.run_dir / "shrink"


def base_folder(config: RunConfig) -> Path:
    """The folder of the smaller base model."""
    return config.run_dir / "base"


def base_record(config: RunConfig) -> dict[str, Any] | None:
    """What is known of the finished smaller base; None if it is not finished."""
    return read_sealed(base_folder(config) / RECORD)


def on_small_base(config: RunConfig) -> RunConfig:
    """The config of everything after the smaller base is made: that is the model which LoRAs are trained on, and the teacher
    becomes the one expert from which the first rung learns. The config itself if it has no `shrink` section.

    ConfigError if the smaller base is not finished.
    """
    if config.shrink is None or config.teachers:
        return config
    if base_record(config) is None:
        raise ConfigError(
            f"shrink: {base_folder(config)} is not there, or damaged; fix: `stepdistill shrink` with this config first"
        )
    small = Teacher(
        path=str(base_folder(config)),
        guidance_scale=config.teacher.guidance_scale,
        unconditional=config.teacher.unconditional,
    )
    original = Expert(name=ORIGINAL, path=str(teacher_folder(config)))
    return config.standing_for({"teacher": small, "teachers": (original,)})


def ladder_facts(config: RunConfig, facts: TeacherFacts) -> TeacherFacts:
    """Facts of the model that the ladder climbs on, from the teacher's: with a U-Net without the parts to remove. With
    `keep`, which parts these are is not known yet, and the facts are the teacher's."""
    if config.shrink is None or config.teachers or not config.shrink.remove:
        return facts
    unet = smaller_config(facts.unet, config.shrink.remove)
    return TeacherFacts(facts.folder, {**facts.configs, "unet": unet})


def ladder_base(config: RunConfig) -> Path:
    """The folder of the model that LoRAs are trained on: the teacher's, or the smaller base's, which may be missing."""
    return teacher_folder(config) if config.shrink is None else base_folder(config)
