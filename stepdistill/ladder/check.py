"""Checks, without weights of the base model, that what a config names for training fits it: taps, LoRAs, teachers."""

import torch

from stepdistill.config import RunConfig
from stepdistill.ladder.initial_lora import check_initial_loras
from stepdistill.models.experts import check_loras_fit
from stepdistill.models.network.kind import build_network
from stepdistill.plan.taps import check_taps
from stepdistill.teacher.experts import check_files, check_prompts
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.small_base import ladder_facts


def check_training(config: RunConfig, facts: TeacherFacts) -> None:
    """ConfigError if a tap, a LoRA that a rung begins with, or one of several teachers does not fit the base model."""
    facts = ladder_facts(config, facts)
    check_taps(config, facts)
    check_initial_loras(config, facts)
    if not config.teachers:
        return
    check_files(config, facts)
    with torch.device("meta"):
        check_loras_fit(config, build_network(facts))
    check_prompts(config.teachers, config.preview.prompts)
