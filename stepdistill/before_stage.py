"""What is checked before a stage begins, so that an error comes before hours of work, and before anything is written.

torch is imported inside the functions.
"""

import logging
from pathlib import Path

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.installed import check_installed
from stepdistill.disk.durable import IMAGE_FORMATS
from stepdistill.run.folder import check_folder
from stepdistill.run.lock import is_alone
from stepdistill.run.start_from import check_start
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.ladder_fit import check_side
from stepdistill.teacher.same_teacher import check_same_teacher, record_teacher
from stepdistill.teacher.small_base import base_record, ladder_base, on_small_base
from stepdistill.teacher.source import check_teacher, is_ready_made, teacher_facts, teacher_folder


def check_run(config: RunConfig) -> None:
    """ConfigError if the teacher, the rungs to start from or the run's folder cannot be used; writes nothing."""
    check_installed(config)
    check_teacher(config)
    try:
        facts: TeacherFacts | None = teacher_facts(config)
    except ConfigError:  # the teacher's configs are not on this disk yet
        facts = None
    if facts is not None and config.data.resolution is not None:
        check_side(config.data.resolution, facts.size_multiple)
    check_start(config, base_prediction_type=None if facts is None else facts.prediction_type)
    check_folder(config)


def check_before_start(config: RunConfig, only: tuple[int, int] | None) -> None:
    """ValueError if a run cannot train, such as one without latents: it is not started, so that its settings may change."""
    check_run(config)
    quiet_libraries()
    from stepdistill.data.cache import load_cache
    from stepdistill.ladder import rungs_of, rungs_to_copy

    rungs_of(config, only)
    check_later_stages(config)
    rungs_to_copy(config)
    load_cache(config)


def check_later_stages(config: RunConfig) -> None:
    """ValueError if another run's latents cannot be used, if exports or table could not be made later, or if a phase
    does not fit its budget or its network."""
    from stepdistill.data.prepare import check_borrowed, check_captions
    from stepdistill.evaluation.check import check_evaluation
    from stepdistill.export.check import check_export
    from stepdistill.ladder.check import check_training
    from stepdistill.plan.budget import kept_modules
    from stepdistill.shrink.check import check_shrink_fits

    check_borrowed(config)
    check_captions(config)
    check_shrink_fits(config, teacher_facts(config))
    if base_record(config) is not None:
        config = on_small_base(config)
    check_export(config)
    check_evaluation(config)
    facts = teacher_facts(config)
    check_training(config, facts)
    kept_modules(config, facts)


def require_same_teacher(config: RunConfig) -> None:
    """ConfigError if the teacher changed since the run was started; the first stage records it, in one process."""
    from stepdistill.runtime import Processes

    processes, folder = Processes(), teacher_folder(config)
    check_same_teacher(config, folder, base=ladder_base(config))
    processes.wait()
    if processes.is_main:
        record_teacher(config, folder)


def check_shrink(config: RunConfig) -> None:
    """ConfigError if the parts that config.shrink removes cannot be removed, as far as the teacher's configs are known."""
    if config.shrink is None or not is_ready_made(config):
        return
    check_run(config)
    quiet_libraries()
    from stepdistill.shrink.check import check_shrink_fits

    check_shrink_fits(config, teacher_facts(config))


def check_has_shrink(config: RunConfig) -> None:
    """ConfigError if the config has no `shrink` section."""
    if config.shrink is None:
        raise ConfigError(
            "shrink: got no such section; allowed: one with `remove` or `keep` (docs/configuration.md)"
        )


def check_captions(config: RunConfig) -> None:
    """ConfigError if a caption of the data is of none of several teachers; hours of `prepare` would come before it."""
    if not config.teachers:
        return
    check_run(config)
    quiet_libraries()
    from stepdistill.data.prepare import check_captions

    check_captions(config)


def require_one_process(command: str) -> None:
    """ConfigError in a launch of several processes, which would all write the same files."""
    if not is_alone():
        raise ConfigError(
            f"{command}: got a launch of several processes; allowed: one process; fix: launch only `stepdistill "
            f"prepare`, `distill` and `evaluate`, and start `stepdistill export` and `report` without a launcher"
        )


def check_image_path(path: Path) -> None:
    """ConfigError if no image can be written to the path: its suffix is unknown, or it is a folder."""
    if path.suffix.lower() not in IMAGE_FORMATS or path.is_dir():
        raise ConfigError(
            f"--output: got {str(path)!r}; allowed: a file that ends in {', '.join(IMAGE_FORMATS)}"
        )


def quiet_libraries() -> None:
    """Lets torch, diffusers, transformers and torchao print no notes, warnings or progress bars of their own."""
    import os

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # not each try to reach another process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # kernels that torchao lacks on this machine, and calls of it that torch calls old
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
