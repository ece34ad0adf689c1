"""The stages of a run; each reads what the stage before wrote into the run's folder. torch is imported inside them.

The command line, and through it `pipelines/*.py`, calls these functions and nothing else.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stepdistill import plan
from stepdistill.before_stage import (
    check_before_start,
    check_captions,
    check_has_shrink,
    check_image_path,
    check_later_stages,
    check_run,
    check_shrink,
    quiet_libraries,
    require_one_process,
    require_same_teacher,
)
from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.installed import check_installed
from stepdistill.config.ladder_checks import often_used_targets, unused_settings
from stepdistill.disk.durable import read_sealed, warn_of_damage, write_image, write_sealed
from stepdistill.disk.places import clear_half_written
from stepdistill.disk.space import check_space
from stepdistill.launch import check_environment
from stepdistill.run.checkpoint_files import unfinished_rungs
from stepdistill.run.folder import open_folder
from stepdistill.run.lock import locked, release_all
from stepdistill.run.rungs import finished_rungs, rung_folder
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.families import plannable_facts
from stepdistill.teacher.ladder_fit import check_ladder_fits, unfit_settings
from stepdistill.teacher.same_teacher import check_same_teacher
from stepdistill.teacher.small_base import base_record, ladder_base, on_small_base
from stepdistill.teacher.source import is_ready_made, teacher_folder
from stepdistill.terminal import one_line, printable_lines

logger = logging.getLogger(__name__)


def open_run(config: RunConfig) -> Path:
    """Calls check_run, then makes the run's folder with config.yaml in it and returns it."""
    check_run(config)
    return open_folder(config)


@contextmanager
def _work_in(config: RunConfig) -> Iterator[Path]:
    """Inside it, this is the only command that works in the run's folder, which holds its config.yaml. Before anything is
    written, `check_run` is called; FolderInUseError if another command works there."""
    check_environment()
    check_run(config)
    with locked(config.run_dir):
        yield open_folder(config)  # checks the folder again, now that no other command changes it


def _is_started(config: RunConfig) -> bool:
    return (config.run_dir / "config.yaml").is_file()


def doctor(config: RunConfig) -> None:
    """Prints the findings about a planned run; ConfigError if anything would stop it."""
    quiet_libraries()
    from stepdistill.doctor.findings import examine, raise_for

    findings = examine(config)
    for finding in findings:
        print(printable_lines(str(finding)))
    raise_for(findings)


def print_plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    cards: int = 1,
    price: float | None = None,
    measure: bool = False,
) -> None:
    """Prints what a run needs of a GPU and how long it takes there. Neither a GPU nor the teacher's weights are needed.

    Args:
        config: the run.
        gpu: a card's name or size; default: the GPU of this machine, or one of 24 GB.
        cards: how many such cards train together.
        price: of an hour of one card.
        measure: make two updates of every kind of phase on this machine's device, with random weights, and compare.
    ConfigError for an unknown card, for a teacher whose configs are neither on this disk nor known, and, after the plan, if
    the run does not fit the card.
    """
    from stepdistill.plan.cards import card_of

    card = None if gpu is None else card_of(gpu)
    if measure:  # the run may be meant for another machine
        check_installed(config)
    quiet_libraries()
    from stepdistill.plan.command import print_plan as show

    show(config, plannable_facts(config), card=card, cards=cards, price=price, measure=measure)


def prepare(config: RunConfig) -> None:
    """Writes latents and text embeddings into the cache; does nothing if they are there already."""
    if not _is_started(config):
        check_shrink(config)
        check_captions(config)
    with _work_in(config) as run_dir:
        _prepare(config, run_dir)


def _prepare(config: RunConfig, run_dir: Path) -> None:
    quiet_libraries()
    from stepdistill.data.cache import is_whole
    from stepdistill.data.prepare import prepare as fill_cache
    from stepdistill.runtime import Processes, environment

    _meet(config)
    write_sealed(run_dir / "environment.json", environment())
    _make_teacher(config)
    require_same_teacher(config)
    teacher = TeacherFacts.of_folder(teacher_folder(config))
    check_ladder_fits(config, teacher)
    if Processes().is_main:
        notes = (
            unused_settings(config.ladder),
            often_used_targets(config.ladder),
            unfit_settings(config, teacher),
        )
        for about, remedy in itertools.chain(*notes):
            logger.warning("prepare: %s; fix: %s", about, remedy)
    manifest = run_dir / "cache" / "manifest.json"
    before = read_sealed(manifest)
    is_damaged = manifest.exists() and (before is None or not is_whole(before))
    if is_damaged:
        warn_of_damage(manifest, "it is written again")
    made = fill_cache(config)
    logger.info("prepare: %s", "the cache is written" if made else "the cache is complete already")
    finished, now = finished_rungs(run_dir), read_sealed(manifest)
    if finished and not is_damaged and (before or {}).get("shards") != (now or {}).get("shards"):
        logger.warning(
            "prepare: the data changed, but the rungs of %s steps were trained on the data before; fix: another "
            "name=..., or `stepdistill distill --rung` for each of them",
            ", ".join(map(str, finished)),
        )


def shrink(config: RunConfig, *, began: float | None = None) -> None:
    """Makes the smaller base model that config.shrink asks for; does nothing if it is there already.

    began: time.monotonic() at the command's start, from which training.max_minutes counts; None: now.
    """
    check_has_shrink(config)
    began = time.monotonic() if began is None else began
    if not _is_started(config):
        check_before_start(config, None)
    with _work_in(config):
        quiet_libraries()
        _shrink(config, began)


def _shrink(config: RunConfig, began: float) -> None:
    from stepdistill.shrink.train import make_small_base

    _meet(config)
    require_same_teacher(config)
    made = make_small_base(config, began=began)
    record = base_record(config) or {}
    logger.info(
        "shrink: %s %s, with %s of %s parameters",
        ladder_base(config),
        "is written" if made else "is there already",
        f"{record.get('parameters', 0):,}",
        f"{record.get('parameters_of_original', 0):,}",
    )


def distill(config: RunConfig, *, only: tuple[int, int] | None = None, began: float | None = None) -> None:
    """Trains the unfinished rungs, or one rung again, after a check that the stages after it can be done.

    began: time.monotonic() at the command's start, from which training.max_minutes counts; None: now.
    """
    began = time.monotonic() if began is None else began
    if not _is_started(config):
        check_before_start(config, only)
    with _work_in(config):
        quiet_libraries()
        on_small_base(config)  # ConfigError if it is not there
        check_later_stages(config)
        _distill(config, only, began=began)


def _distill(config: RunConfig, only: tuple[int, int] | None = None, *, began: float) -> None:
    quiet_libraries()
    from stepdistill.ladder import distill as train_rungs

    _meet(config)
    require_same_teacher(config)
    config = on_small_base(config)
    check_ladder_fits(config, TeacherFacts.of_folder(teacher_folder(config)))
    before = finished_rungs(config.run_dir)
    trained = train_rungs(config, only=only, began=began)
    unfinished = unfinished_rungs(config.run_dir)
    clear_half_written(config.run_dir / "rungs", spared=unfinished.values())
    for steps, folder in unfinished.items():
        logger.warning(
            "distill: the training of the %d-step rung is not finished; its checkpoints stay in %s",
            steps,
            folder,
        )
    logger.info("distill: %s", f"trained {trained}" if trained else "every rung is finished")
    if only is not None and only[1] in before:
        later = [n for n in before if n < only[1]]
        outdated = (
            f"; the rungs of {', '.join(map(str, later))} steps began with the old rung: `stepdistill distill` trains them "
            f"again"
            if later
            else ""
        )
        logger.warning(
            "distill: the old rung's exports are removed, and its images in the table are out of date%s",
            outdated,
        )


def export(
    config: RunConfig,
    *,
    steps: Sequence[int] | None = None,
    push_to: str | None = None,
    dry_run: bool = False,
) -> None:
    """Writes what config.export asks for into the folder of every finished rung.

    Args:
        config: the run.
        steps: student_steps of the rungs to export, in place of all finished ones.
        push_to: a Hub repository to upload the one exported rung to; nothing is uploaded without it.
        dry_run: only print what would be done.
    ConfigError for steps that the ladder does not have, for push_to without exactly one of `steps`, and in a launch of
    several processes.
    """
    require_one_process("export")
    check_run(config)
    ladder_steps = [rung.student_steps for rung in config.ladder]
    chosen = list(steps or [n for n in ladder_steps if n in finished_rungs(config.run_dir)] or ladder_steps)
    if not set(chosen) <= set(ladder_steps):
        raise ConfigError(
            f"--steps: got {', '.join(map(str, chosen))}; allowed: {', '.join(map(str, ladder_steps))}"
        )
    if push_to is not None and len(steps or ()) != 1:
        raise ConfigError(
            "--push: a repository holds one LoRA; allowed: with exactly one --steps, such as --steps 4"
        )
    quiet_libraries()
    from stepdistill.export.check import check_export

    as_written, config = config, on_small_base(config)
    check_export(config)
    if dry_run:
        _print_exports(config, chosen, push_to)
        return
    from stepdistill.export.rung import export_rung

    with locked(config.run_dir):
        require_same_teacher(as_written)
        for count in chosen:
            folder = export_rung(config, count)
            clear_half_written(rung_folder(config.run_dir, count))
            logger.info("export: %s", folder)
    if push_to is not None:
        from stepdistill.export.hub import push_rung

        logger.info("export: %s", push_rung(config, chosen[0], folder, push_to))


def _print_exports(config: RunConfig, chosen: Sequence[int], push_to: str | None) -> None:
    options = config.export
    lower = f", rank {options.rank}" if options.rank is not None else ""
    kinds = [f"{name} in {'float32' if name == 'onnx' else options.dtype}" for name in options.formats]
    kinds += ["onnx in int8"] if options.quantize == "int8" else []
    for count in chosen:
        print(f"export {one_line(str(rung_folder(config.run_dir, count)))}: {', '.join(kinds)}{lower}")
    if push_to is not None:
        print(f"push it to {one_line(push_to)}")


def extract(base: Path, tuned: Path, *, rank: int, output: Path) -> None:
    """Writes a LoRA of the difference between two U-Nets of the same shape, and logs how much of it that rank keeps."""
    require_one_process("extract")
    quiet_libraries()
    from stepdistill.export.rank import extract_to

    reduced = extract_to(output, base, tuned, rank)
    logger.info(
        "extract: rank %d keeps %.2f %% of the change, %.2f %% in the layer where it keeps least; "
        "pipeline.load_lora_weights(%r) loads it",
        rank,
        100 * reduced.energy_kept,
        100 * min(reduced.energy_by_module.values()),
        str(output),
    )
    if reduced.left_out > 0:
        logger.info(
            "extract: %.2f %% of the change is left out, because it is in layers that a LoRA does not cover (conv_in, "
            "conv_out, time embedding, norms, biases)",
            100 * reduced.left_out,
        )


def merge(
    sources: list[Path], *, output: Path, weights: list[float] | None = None, rank: int | None = None
) -> None:
    """Writes the weighted mean of rungs, LoRAs, or whole runs, and logs how much of it the rank keeps."""
    require_one_process("merge")
    quiet_libraries()
    from stepdistill.export.merge import merge as merge_into

    for folder, merged in merge_into(sources, output, weights=weights, rank=rank).items():
        logger.info(
            "merge: %s has rank %d and keeps %.2f %% of the mean, %.2f %% in the layer where it keeps least",
            folder,
            merged.lora.rank,
            100 * merged.energy_kept,
            100 * min(merged.energy_by_module.values()),
        )


def evaluate(config: RunConfig) -> None:
    """Draws and measures every row of the table."""
    with _work_in(config) as run_dir:
        quiet_libraries()
        from stepdistill.evaluation.evaluate import evaluate as measure
        from stepdistill.plan.disk_need import evaluation_bytes

        _meet(config)
        require_same_teacher(config)
        config = on_small_base(config)
        folder = run_dir / "evaluation"
        drawn = sum(1 for _ in folder.rglob("images/*.png"))
        need = evaluation_bytes(config, TeacherFacts.of_folder(teacher_folder(config)), drawn=drawn)
        check_space(folder, need, "evaluation")
        measure(config)


def report(config: RunConfig, *, output: Path | None = None) -> Path:
    """Writes the report of a run (page, table, image grid) and returns its folder, also while another command trains."""
    require_one_process("report")
    check_run(config)
    if not _is_started(config):
        raise ConfigError(f"{config.run_dir} has nothing to report yet: run `stepdistill distill` first")
    return report_runs([config.run_dir], output=output, grid_columns=config.evaluation.grid_columns)


def report_runs(run_dirs: Sequence[Path], *, output: Path | None = None, grid_columns: int = 10) -> Path:
    """Writes the report of one run folder, or a comparison of several, and returns its folder."""
    require_one_process("report")
    from stepdistill.report.build import build_report

    folder = build_report(run_dirs, output, grid_columns=grid_columns)
    table = folder / "results.md"
    if table.is_file():
        logger.info("%s", table.read_text(encoding="utf-8").partition("\n!")[0])
    logger.info("report: %s", folder / "index.html")
    return folder


def run_all(config: RunConfig, *, began: float | None = None) -> None:
    """Runs every stage, after logging how long they will take; what the table needs is checked before training begins.

    began: time.monotonic() at the command's start, from which training.max_minutes counts; None: now.
    """
    began = time.monotonic() if began is None else began
    require_one_process("run")
    check_run(config)
    quiet_libraries()
    if is_ready_made(config):  # before the run's folder is made
        from stepdistill.ladder import rungs_to_copy

        check_later_stages(config)
        rungs_to_copy(config)
    with locked(config.run_dir):
        _run_all(config, began)


def _run_all(config: RunConfig, began: float) -> None:
    from stepdistill.ladder import rungs_to_copy

    if not is_ready_made(config):
        open_folder(config)
        _meet(config)
        _make_teacher(config)
        check_run(config)  # again, now that the teacher's configs are on this disk
        check_later_stages(config)
    rungs_to_copy(config)
    open_folder(config)
    finished = finished_rungs(config.run_dir)
    logger.info(
        "%s",
        plan.describe(config, finished=finished, seconds_per_pass=plan.measured_seconds_per_pass(config)),
    )
    prepare(config)
    logger.info("%s", _estimate(config))
    if config.shrink is not None:
        with _work_in(config):
            _shrink(config, began)
    with _work_in(config):
        _distill(config, began=began)
    export(config)
    evaluate(config)
    report(config)
    refresh_cards(config)
    logger.info("done in %.0f s", time.monotonic() - began)


def refresh_cards(config: RunConfig) -> None:
    """Writes every rung's model card again, with the measured numbers and the report's image grid."""
    from stepdistill.export.rung import refresh_cards as write_again

    write_again(on_small_base(config))


def sample(run_dir: Path, *, steps: int, prompt: str, seed: int, output: Path) -> Path:
    """Draws one image with the `steps`-step student of a run, writes it to `output` and returns that path."""
    require_one_process("sample")
    from stepdistill.config.saved import read_run_config
    from stepdistill.run.rungs import require_rung

    check_image_path(output)
    config = read_run_config(run_dir)
    rungs = [rung.student_steps for rung in config.ladder]
    if steps not in rungs:
        raise ConfigError(
            f"--steps: got {steps}; allowed: {', '.join(map(str, rungs))}, the rungs of this run"
        )
    require_rung(run_dir, steps)
    check_same_teacher(config, teacher_folder(config), base=ladder_base(config))
    config = on_small_base(config)
    quiet_libraries()
    from stepdistill.evaluation.draw.sampler import draw
    from stepdistill.export.exported import is_exported
    from stepdistill.export.rung import export_rung
    from stepdistill.runtime import default_device
    from stepdistill.sampling import load_few_step
    from stepdistill.teacher.loading import load_pipeline

    if not is_exported(rung_folder(run_dir, steps)):
        with locked(run_dir):
            export_rung(config, steps)
    pipeline = load_pipeline(teacher_folder(config)).to(default_device())
    load_few_step(pipeline, rung_folder(run_dir, steps))
    images, _ = draw(pipeline, [prompt], steps=steps, guidance_scale=1.0, seed=seed, first=0)
    write_image(output, images[0])
    return output


def _estimate(config: RunConfig) -> str:
    """How many minutes the run will take: the plan's number of network passes times the time of one measured here."""
    from stepdistill.ladder import seconds_per_forward
    from stepdistill.runtime import is_out_of_memory

    try:
        each = seconds_per_forward(config)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return "no estimate of the time: training.train_batch_size samples need too much memory; training will take fewer"
    training = each * plan.training_forwards(config, finished=finished_rungs(config.run_dir))
    if base_record(config) is None:
        training += each * plan.shrink_forwards(config)
    evaluation = each * plan.evaluation_forwards(config)
    return (
        f"this will take about {(training + evaluation) / 60:.1f} minutes here: "
        f"{training / 60:.1f} to train, {evaluation / 60:.1f} to draw the images of the table"
    )


def _meet(config: RunConfig) -> None:
    """Lets the processes of a launch meet; with one process it does nothing."""
    from stepdistill.runtime import meet

    meet(config.run_dir, timeout_minutes=config.training.distributed_timeout, release=release_all)


def _make_teacher(config: RunConfig) -> None:
    """Makes a pipeline's folder of the teacher if it is not one yet; one process does it, the others wait."""
    from stepdistill.runtime import Processes
    from stepdistill.teacher.make import make_teacher

    processes = Processes()
    if processes.is_main:
        make_teacher(config)
    processes.wait()
