"""Checks whether a LoRA fits a teacher, by loading it as diffusers does onto a U-Net that has shapes but no numbers."""

import logging
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from stepdistill.messages import first_line
from stepdistill.teacher.examine import not_finite
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.lora_header import check_lora_header

_PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
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
    """ValueError if a LoRA's file is damaged, or does not fit the U-Net of a pipeline's folder.

    A LoRA of the text encoders alone is accepted, since only U-Net weights are tested.
    """
    check_lora_numbers(file)
    teacher = TeacherFacts.of_folder(folder)
    made_by = _PIPELINES[teacher.pipeline_class]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(teacher.unet)).eval()
    logger = logging.getLogger("diffusers")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # the error below says the same in one line
        with warnings.catch_warnings(action="ignore"):
            state, alphas = made_by.lora_state_dict(
                str(file), unet_config=unet.config, use_safetensors=True, local_files_only=True
            )[:2]
            if any(key.startswith("unet.") for key in state):
                unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=_NAME)
    except Exception as error:  # diffusers and peft raise many kinds of errors for foreign or broken files
        raise ValueError(f"{file} does not fit the U-Net of {folder}: {_why(error)}") from None
    finally:
        logger.setLevel(level)
    if not state:
        raise ValueError(f"{file} holds no LoRA of Stable Diffusion")


def _why(error: Exception) -> str:
    mismatch = "size mismatch for "
    lines = [line.strip() for line in str(error).splitlines() if mismatch in line]
    return (
        f"{len(lines)} of its weights have other shapes, first {lines[0].partition(mismatch)[2]}"
        if lines
        else first_line(error)
    )
