"""Checks of what `export` will be asked for, made before anything is trained."""

from stepdistill.config import ConfigError, RunConfig
from stepdistill.export.int8_onnx import check_quantiser
from stepdistill.export.kohya import family_of
from stepdistill.export.onnx_unet import check_installed
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.source import teacher_facts


def check_export(config: RunConfig) -> None:
    """ConfigError if config.export asks for what cannot be written; the kohya file's names need the teacher's configs."""
    rank = config.export.rank
    if rank is not None and rank >= config.lora.rank:
        raise ConfigError(
            f"export.rank: got {rank}; allowed: below lora.rank {config.lora.rank}, or null for the trained rank"
        )
    try:
        facts = teacher_facts(config)
    except ConfigError:  # the teacher's configs are not on this disk yet
        facts = None
    check_formats(config, facts)


def check_formats(config: RunConfig, facts: TeacherFacts | None) -> None:
    """ConfigError for formats that cannot be written; facts: from the teacher's configs, None if they are not known yet."""
    formats = config.export.formats
    if "onnx" in formats:
        check_installed()
    if config.export.quantize != "none":
        if "onnx" not in formats:
            raise ConfigError(
                f"export.quantize: got {config.export.quantize} without onnx among export.formats ({', '.join(formats)}); "
                f"allowed: none, or with onnx"
            )
        check_quantiser()
    names, is_sdxl = config.export.kohya_names, facts is None or family_of(facts) == "sdxl"
    if "kohya" in formats and names == "sgm" and not is_sdxl:
        raise ConfigError(
            "export.kohya_names: got sgm for a base that is not SDXL; allowed: auto, diffusers (which kohya uses for SD)"
        )
