"""The checks of `stepdistill doctor` on the teacher, a folder, a file or a repository, down to its last weight."""

from collections.abc import Iterator
from pathlib import Path

from stepdistill.config import ConfigError, RunConfig
from stepdistill.doctor.finding import Finding
from stepdistill.plan.cards import GIB
from stepdistill.teacher.examine import examine_pipeline, not_finite
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import missing_parts, teacher_kind
from stepdistill.teacher.lora_trial import check_lora_goes_on
from stepdistill.teacher.same_teacher import check_same_teacher
from stepdistill.teacher.source import (
    cached_repository,
    check_teacher,
    check_teacher_folder,
    configs_folder,
    is_ready_made,
    local_folder,
    made_folder,
    teacher_lora_file,
)

_COPY_AGAIN = "another copy of the model"


def teacher_findings(config: RunConfig) -> Iterator[Finding]:
    """The teacher's problems, or that it is intact; ConfigError for a problem that stops the checks."""
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    check_teacher(config)
    used = local_folder(path) if is_ready_made(config) else made_folder(config)
    if used is not None:
        check_same_teacher(config, used)
    if kind == "folder":
        folder = local_folder(path)
        problems = list(_broken(config, folder))
        yield from problems
        if problems:
            return
        facts = TeacherFacts.of_folder(folder)
        path_of_noise = (
            ", a rectified flow"
            if facts.matches_flows
            else ", zero terminal SNR"
            if facts.is_zero_snr
            else ""
        )
        height, width = facts.image_size
        yield Finding(
            "ok", f"teacher: {path}, {width} x {height} pixels, {facts.prediction_type}{path_of_noise}"
        )
    elif kind == "file":
        yield from _file(config)
    else:
        yield from _repository(config)


def _file(config: RunConfig) -> Iterator[Finding]:
    """The findings about a single file; with the configs on this disk its weights are compared with them by its header."""
    path, file = config.teacher.path, Path(config.teacher.path).expanduser()
    try:
        folder = configs_folder(config)
    except ConfigError:
        folder = None
    if folder is not None:
        problems = list(_broken(config, folder, file))
    else:
        bad = not_finite([file])
        what = f"teacher: {bad} of {path} holds numbers that are not finite"
        problems = [] if bad is None else [Finding("problem", what, _COPY_AGAIN)]
    yield from problems
    if problems:
        return
    size = file.stat().st_size / GIB
    yield Finding(
        "ok", f"teacher: the file {path}, {size:.1f} GiB; `prepare` converts it to a pipeline's folder"
    )
    if config.teacher.config is None:
        remedy = "teacher.config=FOLDER, a diffusers folder whose configs and tokenizers belong to the file"
        about = "teacher: its configs are looked up in the Hub's cache or on the Hub"
        yield Finding("note", about, remedy)


def _broken(config: RunConfig, folder: Path, file: Path | None = None) -> Iterator[Finding]:
    """The problems of a pipeline, whose weights may be in a single file, and of the LoRAs to merge into it."""
    problems = [*examine_pipeline(folder, file), *_loras(config, folder)]
    yield from (Finding("problem", f"teacher: {problem}", _COPY_AGAIN) for problem in problems)


def _loras(config: RunConfig, folder: Path) -> Iterator[str]:
    for number, lora in enumerate(config.teacher.loras):
        try:
            check_lora_goes_on(teacher_lora_file(lora.path), folder)
        except ValueError as error:
            yield f"teacher.loras.{number}.path: {error}"


def _repository(config: RunConfig) -> Iterator[Finding]:
    path = config.teacher.path
    folder = cached_repository(path, config.teacher.revision)
    if folder is not None and not missing_parts(folder):
        check_teacher_folder(config, folder)
        problems = list(_broken(config, folder))
        yield from problems or [Finding("ok", f"teacher: {path}, in the Hub's cache")]
    else:
        remedy = f"hf download {path}, or the folder of a copy on this disk as teacher.path"
        yield Finding(
            "note",
            f"teacher: {path} is not in the Hub's cache, or is incomplete there; `prepare` downloads it",
            remedy,
        )
