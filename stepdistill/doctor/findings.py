"""Checks, in seconds, what would stop a run: packages, device, teacher, data, evaluation, disk; each with its remedy."""

import functools
import importlib.metadata
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from packaging.requirements import Requirement

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.data import Kind
from stepdistill.config.installed import installation_problems
from stepdistill.config.ladder_checks import often_used_targets, unused_settings
from stepdistill.data.buckets import Sizes
from stepdistill.data.decode import BadSample, read_caption
from stepdistill.data.held_out import held_out_share
from stepdistill.data.prepare import check_borrowed, check_captions
from stepdistill.data.records import is_cache, is_prompts_only, records
from stepdistill.data.size_counts import bucket_notes
from stepdistill.data.source import image_of
from stepdistill.demo.world import world_of
from stepdistill.disk.places import check_writable
from stepdistill.disk.space import folder_bytes, free_bytes
from stepdistill.doctor.finding import Finding
from stepdistill.doctor.teacher import teacher_findings
from stepdistill.export.check import check_export, formats_for
from stepdistill.ladder.check import check_training
from stepdistill.ladder.train import rungs_to_copy
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import GIB
from stepdistill.plan.disk_need import disk_need
from stepdistill.plan.smaller import smaller_run
from stepdistill.plan.text import verdict
from stepdistill.plan.whole_run import card_here, plan_run
from stepdistill.run.folder import check_folder
from stepdistill.run.start_from import check_start
from stepdistill.shrink.check import check_shrink_fits
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.families import plannable_facts
from stepdistill.teacher.folder import EMBEDDED
from stepdistill.teacher.ladder_fit import check_ladder_fits, unfit_settings
from stepdistill.teacher.source import is_ready_made, made_folder, teacher_facts

LOOKED_AT = 64
"""Number of samples of the data that are read in full."""
_TOKENS_A_WORD = 1.3
_MAX_TOKENS = 75  # of a prompt that CLIP reads, besides those of start and end
_EXTRACTORS = (
    "evaluation.features=inception:FILE with Inception's weights (NVIDIA's inception-2015-12-05.pt), or clip:FOLDER or "
    "dinov2:FOLDER with a folder of CLIP or DINOv2"
)


def examine(config: RunConfig) -> list[Finding]:
    """All findings about a planned run; it downloads and trains nothing and leaves nothing on the disk.

    If the teacher has a problem, checks that need an intact teacher are left out.
    """
    findings: list[Finding] = []
    for part in (_packages, _device, _memory, _run, _export, _previews):
        findings += _findings(part, config)
    teacher = _findings(teacher_findings, config)
    is_whole = not any(finding.state == "problem" for finding in teacher)
    findings += teacher + _findings(functools.partial(_data, teacher_is_whole=is_whole), config)
    for part in (_ladder, _buckets, _evaluation, _disk) if is_whole else ():
        findings += _findings(part, config)
    return list(dict.fromkeys(findings))


def _findings(part: Callable[[RunConfig], Iterator[Finding]], config: RunConfig) -> list[Finding]:
    """The findings of one part; a ValueError that stops it becomes a problem."""
    findings: list[Finding] = []
    try:
        findings.extend(part(config))
    except ValueError as error:  # ValueErrors carry messages for the user
        mark = next((mark for mark in ("; allowed: ", "; fix: ") if mark in str(error)), "; allowed: ")
        message, _, remedy = str(error).partition(mark)
        findings.append(Finding("problem", message, remedy))
    return findings


def _packages(config: RunConfig) -> Iterator[Finding]:
    for problem in installation_problems(config):
        about, _, remedy = problem.partition("; fix: ")
        yield Finding("problem", about, remedy)
    wrong = []
    for text in importlib.metadata.requires("stepdistill") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, needed {requirement.specifier}")
    if wrong:
        yield Finding("problem", f"packages: {'; '.join(wrong)}", "pip install --upgrade stepdistill")
    else:
        yield Finding("ok", f"packages: torch {torch.__version__} and the others are as required")


def _device(config: RunConfig) -> Iterator[Finding]:
    precision = config.training.mixed_precision
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Finding("ok", f"device: the CPU, {threads} thread{'s' if threads > 1 else ''}")
        if precision == "fp16":
            remedy = "training.mixed_precision=no"
            yield Finding("note", "device: float16 is several times slower than float32 on a CPU", remedy)
        if config.teacher.path not in EMBEDDED:
            yield Finding(
                "note",
                "device: no CUDA GPU found; with a teacher of Stable Diffusion's size a rung takes days",
            )
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    yield Finding("ok", f"device: {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        remedy = "training.mixed_precision=fp16"
        yield Finding("problem", f"device: {properties.name} has no bfloat16", remedy)
    if precision == "no" and config.teacher.path not in EMBEDDED:
        remedy = "training.mixed_precision=bf16, or fp16 on cards before Ampere"
        yield Finding(
            "note",
            "device: float32 takes twice the memory and several times the time of half precision",
            remedy,
        )


def _memory(config: RunConfig) -> Iterator[Finding]:
    """Whether the run fits the GPU of this machine, by one update of every phase on the meta device."""
    card = card_here()
    if card is None:
        return
    try:
        facts = plannable_facts(config)
    except ConfigError:
        yield Finding(
            "note", "memory: known when the teacher's configs are on this disk", "`stepdistill prepare`"
        )
        return
    try:
        keeps = kept_modules(config, facts)
    except ConfigError as error:
        about, _, remedy = str(error).partition("; fix: ")
        yield Finding("problem", about, remedy)
        return
    planned = plan_run(config, facts, card, keeps=keeps)
    if planned.fits:
        yield Finding("ok", f"memory: {verdict(planned)}")
        return
    smaller = smaller_run(config, facts, planned)
    if smaller is None:
        yield Finding(
            "problem", f"memory: {verdict(planned)}", "a card with more memory, or a smaller teacher"
        )
    else:
        yield Finding("problem", f"memory: {verdict(planned)}", " ".join(smaller[0]))


def _run(config: RunConfig) -> Iterator[Finding]:
    teacher = _facts(config)
    check_start(config, base_prediction_type=None if teacher is None else teacher.prediction_type)
    check_folder(config)
    try:
        check_writable(config.run_dir)
    except OSError as error:
        remedy = "another output_dir, or permission to write there"
        yield Finding("problem", f"run: no file can be made in {config.run_dir}: {error.strerror}", remedy)
        return
    will = "exists and will be continued" if (config.run_dir / "config.yaml").is_file() else "will be made"
    yield Finding("ok", f"run: {config.run_dir} {will}")


def _ladder(config: RunConfig) -> Iterator[Finding]:
    for about, remedy in (*unused_settings(config.ladder), *often_used_targets(config.ladder)):
        yield Finding("note", about, remedy)
    teacher = _facts(config)
    if teacher is None:
        about = "ladder: whether it fits the teacher is checked when the teacher's configs are on this disk"
        yield Finding("note", about, "`stepdistill prepare`, then doctor again")
        return
    check_ladder_fits(config, teacher)
    if config.shrink is None and (is_ready_made(config) or made_folder(config)):
        rungs_to_copy(config)
    check_shrink_fits(config, teacher)
    check_training(config, teacher)
    for about, remedy in unfit_settings(config, teacher):
        yield Finding("note", about, remedy)


def _facts(config: RunConfig) -> TeacherFacts | None:
    """Facts from the teacher's configs; None if they are not on this disk yet."""
    try:
        return teacher_facts(config)
    except ConfigError:
        return None


def _data(config: RunConfig, *, teacher_is_whole: bool) -> Iterator[Finding]:
    data = config.data
    if world_of(data.source) is not None:
        yield Finding("ok", f"data: {data.source}, rendered on demand")
        return
    bad: Counter[Kind] = Counter()
    first: dict[str, str] = {}
    sides, longest, seen = [], 0, 0
    for record in itertools.islice(records(data.source), LOOKED_AT):
        seen += 1
        try:
            longest = max(longest, len(read_caption(record.read_caption()).split()))
            if record.read_image is not None:
                sides.append(min(image_of(record, data).size))
        except BadSample as error:
            bad[error.kind] += 1
            first.setdefault(error.kind, f"{record.name}: {error}")
    what = "prompts alone" if is_prompts_only(data.source) else "samples"
    what = "captions of another run's latents" if is_cache(data.source) else what
    yield Finding("ok", f"data: {data.source}, the first {seen} {what} read")
    if sides and config.evaluation.real_images is None and held_out_share(data) == 0:
        remedy = "data.held_out=0.2, or evaluation.prompts and evaluation.real_images that are not trained on"
        yield Finding("note", "data: the table compares with training images", remedy)
    for kind, count in bad.items():
        stops = data.policy(kind) == "error" or count > data.max_bad_fraction * seen
        remedy = ", ".join(
            [*data.cures([kind]), f"other samples, or data.max_bad_fraction and data.on_bad.{kind}"]
        )
        yield Finding("problem" if stops else "note", f"data: {count} {kind} ({first[kind]})", remedy)
    if longest * _TOKENS_A_WORD > _MAX_TOKENS:
        yield Finding(
            "note", f"data: captions of up to {longest} words; CLIP reads about 57 and cuts off the rest"
        )
    teacher = _facts(config)
    if teacher_is_whole and teacher is not None:
        check_borrowed(config)
    check_captions(config)
    has_images = not (is_prompts_only(data.source) or is_cache(data.source))
    if teacher_is_whole and teacher is not None and has_images:
        size = Sizes(data, teacher_size=teacher.image_size, multiple=teacher.size_multiple).target
        if data.min_side > min(size):
            about = f"data: min_side={data.min_side} leaves out even images as large as the {min(size)} pixels to train on"
            yield Finding("note", about, f"data.min_side={max(1, min(size) // 2)}")
        small = sum(side < min(size) for side in sides)
        if small:
            remedy = f"larger images, or data.min_side={min(size)} to leave them out"
            few = f"{small} of {len(sides)} images are smaller than the {min(size)} pixels to train on"
            yield Finding("note", f"data: {few} and are enlarged", remedy)


def _buckets(config: RunConfig) -> Iterator[Finding]:
    for about, remedy in bucket_notes(config):
        yield Finding("note" if remedy else "ok", f"data: {about}", remedy)


def _export(config: RunConfig) -> Iterator[Finding]:
    check_export(config)
    facts = _facts(config)
    formats = config.export.formats if facts is None else formats_for(config, facts)
    yield Finding("ok", f"export: {', '.join(formats)} can be written")


def _previews(config: RunConfig) -> Iterator[Finding]:
    longest = max(len(prompt.split()) for prompt in config.preview.prompts)
    if longest * _TOKENS_A_WORD > _MAX_TOKENS:
        about = f"preview: prompts of up to {longest} words; CLIP reads about 57 and cuts off the rest"
        yield Finding("note", about, "shorter preview.prompts")


def _evaluation(config: RunConfig) -> Iterator[Finding]:
    from stepdistill.evaluation.check import check_evaluation

    if _facts(config) is None:
        about = "evaluation: prompts, real images and extractors are checked when the teacher's configs are on this disk"
        yield Finding("note", about, "`stepdistill prepare`, then doctor again")
        return
    choice = check_evaluation(config)
    yield Finding("ok", "evaluation: prompts, real images and extractors can be used")
    yield from (Finding("note", f"evaluation: {text}") for text in choice.warnings)
    if choice.learns and not choice.is_named:
        about = "FID is measured by a small network trained on your images in minutes (evaluation.features=trained)"
        yield Finding(
            "note", f"evaluation: {about}", f"for numbers comparable with published ones: {_EXTRACTORS}"
        )
    elif choice.spec is None:
        yield Finding("note", f"evaluation: no FID: {choice.why}", _EXTRACTORS)


def _disk(config: RunConfig) -> Iterator[Finding]:
    free = free_bytes(config.run_dir)
    teacher = _facts(config)
    if teacher is None:
        yield Finding(
            "ok",
            f"disk: {_bytes(free)} free; what the run needs is estimated when the teacher's configs are on this disk",
        )
        return
    need = disk_need(config, teacher)
    written = min(need.total, folder_bytes(config.run_dir))
    state: Literal["ok", "problem"] = "ok" if need.total - written < free else "problem"
    remedy = (
        ""
        if state == "ok"
        else "another output_dir, data.dtype=float16, a smaller data.num_images or evaluation.num_images"
    )
    parts = ("teacher", "base", "cache", "rungs", "checkpoints", "evaluation", "report")
    each = ", ".join(f"{part} {_bytes(size)}" for part in parts if (size := getattr(need, part)))
    about = f"{_bytes(free)} free, the run needs about {_bytes(need.total)}{'' if need.is_whole else ' or more'} ({each})"
    yield Finding(
        state, f"disk: {about}{f', {_bytes(written)} of it already written' if written else ''}", remedy
    )


def _bytes(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


def raise_for(findings: list[Finding]) -> None:
    """ConfigError if any finding is a problem."""
    count = sum(finding.state == "problem" for finding in findings)
    if count:
        raise ConfigError(f"{count} problem{'s' * (count > 1)} to fix before this runs")
