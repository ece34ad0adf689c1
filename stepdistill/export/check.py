"""Checks of what `export` will be asked for, made before anything is trained."""

from stepdistill.config import ConfigError, Export, RunConfig
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


def formats_for(config: RunConfig, facts: TeacherFacts) -> tuple[str, ...]:
    """The formats of config.export that are written: for a transformer no kohya file, as ComfyUI reads diffusers' own."""
    formats = config.export.formats
    return tuple(name for name in formats if name != "kohya" or facts.network_part == "unet")


def check_formats(config: RunConfig, facts: TeacherFacts | None) -> None:
    """ConfigError for formats that cannot be written; facts: from the teacher's configs, None if they are not known yet."""
    formats = config.export.formats
    if facts is not None and facts.network_part == "transformer":
        by_default = formats == Export.model_fields["formats"].default  # kohya's file is then left out
        odd = sorted({"fused", "onnx", *(() if by_default else ("kohya",))} & set(formats))
        if odd:
            raise ConfigError(
                f"export.formats: got {odd[0]}, which is written for U-Nets; allowed for a transformer: diffusers"
            )
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
