"""Checks whether a LoRA fits a teacher, by loading it as diffusers does onto a network that has shapes but no numbers."""

import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

from stepdistill.messages import first_line
from stepdistill.teacher.examine import not_finite
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.lora_header import check_lora_header
from stepdistill.teacher.weights import build_part

_NAME = "tried"


def check_lora_numbers(file: Path) -> None:
    """ValueError if a LoRA's file holds numbers that are not finite, a header that is unsafe to load, or cannot be read."""
    check_lora_header(file)
    key = not_finite([file])
    if key is not None:
        raise ValueError(
            f"{file}: {key} holds numbers that are not finite: the file is damaged, or its training diverged"
        )


def check_lora_goes_on(file: Path, folder: Path) -> None:
    """ValueError if a LoRA's file is damaged, or does not fit the network of a pipeline's folder.

    A LoRA of the text encoders alone is accepted, since only the network's weights are tested.
    """
    check_lora_numbers(file)
    teacher = TeacherFacts.of_folder(folder)
    made_by, part = getattr(diffusers, teacher.pipeline_class), teacher.network_part
    with torch.device("meta"):
        network: Any = build_part(teacher, part)
    options = {"unet_config": network.config} if part == "unet" else {}
    logger = logging.getLogger("diffusers")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # the error below says the same in one line
        with warnings.catch_warnings(action="ignore"):
            found = made_by.lora_state_dict(str(file), use_safetensors=True, local_files_only=True, **options)
            state, alphas = found[:2] if isinstance(found, tuple) else (found, None)
            if any(key.startswith(f"{part}.") for key in state):
                network.load_lora_adapter(state, prefix=part, network_alphas=alphas, adapter_name=_NAME)
    except Exception as error:  # diffusers and peft raise many kinds of errors for foreign or broken files
        what = "U-Net" if part == "unet" else part
        raise ValueError(f"{file} does not fit the {what} of {folder}: {_why(error)}") from None
    finally:
        logger.setLevel(level)
    fitting = ("unet.", "text_encoder") if part == "unet" else (f"{part}.",)
    if not any(key.startswith(fitting) for key in state):
        raise ValueError(f"{file} holds no LoRA of a {teacher.pipeline_class}")


def _why(error: Exception) -> str:
    mismatch = "size mismatch for "
    lines = [line.strip() for line in str(error).splitlines() if mismatch in line]
    return (
        f"{len(lines)} of its weights have other shapes, first {lines[0].partition(mismatch)[2]}"
        if lines
        else first_line(error)
    )
