"""Checks, without weights, that what a `shrink` section asks for can be removed from the teacher's U-Net."""

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import ConfigError, RunConfig
from stepdistill.shrink.smaller_network import parameters_of
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.unet_parts import can_follow, check_removed, removable, smaller_config


def check_shrink_fits(config: RunConfig, facts: TeacherFacts) -> None:
    """ConfigError if the U-Net has not the parts to remove, or if `keep` is below the share that must stay.

    facts: of the teacher, not of a smaller base.
    """
    shrink = config.shrink
    if shrink is None:
        return
    if shrink.keep is None:
        check_removed(facts.unet, shrink.remove)
        return
    removed: list[str] = []
    for part in removable(facts.unet):
        if can_follow(facts.unet, removed, part):
            removed.append(part)
    with torch.device("meta"):
        left, whole = (
            parameters_of(UNet2DConditionModel.from_config(smaller_config(facts.unet, parts)))
            for parts in (removed, ())
        )
    if left > shrink.keep * whole:
        raise ConfigError(
            f"shrink.keep: got {shrink.keep:g}, but without every part that can be removed {left / whole:.3f} of the "
            f"parameters are left; allowed: {left / whole:.3f} or more"
        )
