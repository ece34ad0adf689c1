"""Checks, before anything expensive runs, that the evaluation can be done after training."""

from dataclasses import replace
from pathlib import Path

from stepdistill.config import ConfigError, LoraRow, RunConfig
from stepdistill.data.buckets import scheduler_of
from stepdistill.evaluation.draw.rows import lora_file, rows_of, try_scheduler
from stepdistill.evaluation.evaluation_set import ImageFolder, evaluation_set_of
from stepdistill.evaluation.measure.choice import Choice, choose_features
from stepdistill.evaluation.measure.image_sets import Distances
from stepdistill.evaluation.measure.outside_scorer import check_score_cmd
from stepdistill.evaluation.protocol import real_warnings
from stepdistill.teacher.experts import check_prompts
from stepdistill.teacher.lora_trial import check_lora_goes_on
from stepdistill.teacher.source import configs_folder, teacher_facts


def check_evaluation(config: RunConfig) -> Choice:
    """The feature extractor that the evaluation will use, with its warnings.

    ValueError if the evaluation could not be done: checks prompts, images and their size, LoRAs and their schedulers, the
    external scorer, and extractor weights.
    """
    folder = configs_folder(config)
    for row in rows_of(config):
        if row.lora is not None:
            _check_lora(row.lora, folder)
            try_scheduler(row.lora, scheduler_of(config, teacher_facts(config)))
    evaluation_set = evaluation_set_of(config)
    check_prompts(config.teachers, evaluation_set.prompts)
    for precision in config.evaluation.onnx:
        asked = config.export
        if "onnx" not in asked.formats or (precision == "int8" and asked.quantize != "int8"):
            raise ConfigError(
                f"evaluation.onnx: got {precision}, which export does not write; fix: export.formats=[diffusers,onnx]"
                + (" export.quantize=int8" if precision == "int8" else "")
            )
    if config.evaluation.score_cmd is not None:
        check_score_cmd(config.evaluation.score_cmd)
    if isinstance(evaluation_set.real, ImageFolder):
        evaluation_set.real.check()
    choice = choose_features(config, evaluation_set)
    distances = Distances(choice.options(config), device="cpu")
    distances.check_size(teacher_facts(config).image_size)
    return replace(
        choice, warnings=(*choice.warnings, *real_warnings(config.evaluation, evaluation_set, distances))
    )


def _check_lora(lora: LoraRow, folder: Path) -> None:
    try:
        check_lora_goes_on(lora_file(lora), folder)
    except ValueError as error:
        raise ConfigError(
            f"evaluation.loras: {lora.name}: {error}; allowed: LoRAs of the teacher's family"
        ) from None
