"""What a run will do and how many forward passes of the network (of one sample) it will take, before it starts. No torch."""

import statistics
from collections.abc import Collection
from pathlib import Path

from stepdistill.config import ConfigError, Phase, RunConfig, Rung
from stepdistill.config.evaluation import COST_REPEATS
from stepdistill.config.objective_kinds import OBJECTIVES
from stepdistill.diffusion.grid import next_node, passes_per_step, substeps, trailing_nodes
from stepdistill.run.log import read_log
from stepdistill.run.start_from import taken_steps
from stepdistill.teacher.small_base import base_record
from stepdistill.teacher.source import teacher_timesteps

# Costs per sample in units of one forward pass of the bare U-Net, from counts of DryRun on SDXL and SD1.5. The base model
# as a teacher is the bare U-Net; an earlier rung's student as a teacher has a LoRA.
_LORA_FORWARD = 1.083
_BACKWARD = 1.268
# A forward pass of the U-Net's encoder and mid-block with a LoRA: 0.45 on SDXL, 0.34 on SD1.5.
_ENCODER = 0.40
# A frozen trunk has no backward pass and no adapter: a single phase's 3.55 becomes 1.35.
_FROZEN_TRUNK = -2.2
# The share of the discriminator's cost that is spent only when the student learns: the student's own pass through it and
# back. With it, phases of 5 critic updates are within a fifth of what DryRun counts.
_OF_STUDENT = 0.36

_TRAINED_WHOLE = 3.0  # forward and backward pass of a network all of whose weights are trained

STAGES = ("prepare", "shrink", "distill", "export", "evaluate", "report")
"""The stages, in the order in which they run."""


def phase_forwards(config: RunConfig, rung: Rung, phase: Phase) -> float:
    """Cost of one phase per sample and update, in forward passes of the bare U-Net; a pass with a LoRA counts 1.083.

    Where critics are updated more often than the student, it is the mean over updates.
    """
    share = 1 / phase.updates_per_student_update
    student = _LORA_FORWARD * (1 + own_moves(rung, phase)) + share * _BACKWARD
    again = _recomputed_forwards(phase, share) if config.training.gradient_checkpointing else 0.0
    teacher = _teacher_forwards(config, rung, phase)
    if phase.updates_per_student_update > 1 and not _real_is_by_teacher(phase):
        teacher *= share  # critics alone do not ask it
    return teacher + student + _discriminator_forwards(phase) + _scores_forwards(config, phase) + again


def own_moves(rung: Rung, phase: Phase) -> float:
    """The student's own moves before x_t, averaged over the nodes: (N - 1) / 2; 0 if it starts at noised data."""
    return (rung.student_steps - 1) / 2 if phase.inputs == "own" else 0.0


def _real_is_by_teacher(phase: Phase) -> bool:
    """Whether the discriminator's real samples are the teacher's."""
    return phase.adversary is not None and phase.discriminator.real == "teacher"


def _scores_forwards(config: RunConfig, phase: Phase) -> float:
    """What the two scores add: a training pass of the fake one, and a guided pass of the base when the student learns."""
    if not phase.matches_distributions:
        return 0.0
    real = passes_per_step(config.teacher.guidance_scale)
    return _LORA_FORWARD + _BACKWARD + real / phase.updates_per_student_update


def _recomputed_forwards(phase: Phase, share: float) -> float:
    """What gradient checkpointing computes again: the forward passes of student and fake score, and those of the
    discriminator's encoder. share: of the updates, those in which the student learns."""
    training = _LORA_FORWARD * (share + phase.matches_distributions)
    if phase.adversary is None:
        return training
    # The discriminator learns from a pass of the real sample and one of the student's, in a paired phase also one of x_t;
    # the student learns from another pass of its own sample. A frozen trunk computes only the latter again.
    critic_passes = 3 if phase.adversary == "paired" else 2
    passes = share if phase.discriminator.trunk == "frozen" else critic_passes + share
    return training + _ENCODER * passes


def _teacher_forwards(config: RunConfig, rung: Rung, phase: Phase) -> float:
    each = _LORA_FORWARD
    if is_base_teacher(config, rung, phase):
        each = float(passes_per_step(config.teacher.guidance_scale))
    if not phase.needs_teacher_moves:
        return phase.asks_teacher * each
    share_of_new = min(1.0, (phase.cached_updates or phase.max_train_steps) / phase.max_train_steps)
    teacher_steps = phase.teacher_steps or rung.teacher_steps
    return share_of_new * teacher_substeps(rung, teacher_steps, teacher_timesteps(config)) * each


def is_base_teacher(config: RunConfig, rung: Rung, phase: Phase) -> bool:
    """Whether the teacher of a phase is the base model, as on the first rung, rather than a student."""
    if phase.teacher == "ema":
        return False
    earlier = [r.student_steps for r in config.ladder if r.student_steps > rung.student_steps]
    return (phase.teacher_steps or rung.teacher_steps) not in earlier


def _discriminator_forwards(phase: Phase) -> float:
    forwards = None if phase.adversary is None else OBJECTIVES[phase.adversary].discriminator_forwards
    if forwards is None:
        return 0.0
    all_passes = forwards + (_FROZEN_TRUNK if phase.discriminator.trunk == "frozen" else 0.0)
    return all_passes * (1 - _OF_STUDENT * (1 - 1 / phase.updates_per_student_update))


def teacher_substeps(rung: Rung, teacher_steps: int, num_train_timesteps: int) -> float:
    """Number of teacher steps within one student step, averaged over the timesteps that the student is trained at."""
    count = num_train_timesteps
    nodes = trailing_nodes(rung.node_steps or rung.student_steps, num_train_timesteps=count)
    moves = 0
    for node in nodes:
        end = next_node(node, rung.student_steps, num_train_timesteps=count)
        moves += len(substeps(node, end, teacher_steps, num_train_timesteps=count)) - 1
    return moves / len(nodes)


def training_forwards(config: RunConfig, *, finished: Collection[int] = ()) -> float:
    """Forward passes of all phases, without rungs taken over from another run and those in `finished` (student_steps)."""
    done = {*finished, *taken_steps(config)}
    batch = config.training.train_batch_size * config.training.gradient_accumulation_steps
    return batch * sum(
        phase.max_train_steps * phase_forwards(config, rung, phase)
        for rung in config.ladder
        if rung.student_steps not in done
        for phase in rung.phases
    )


def shrink_forwards(config: RunConfig) -> float:
    """Forward passes of the training of a smaller base, as if it were as large as the original; 0 without one."""
    if config.shrink is None:
        return 0.0
    again = 1.0 if config.training.gradient_checkpointing else 0.0
    batch = config.training.train_batch_size * config.training.gradient_accumulation_steps
    return config.shrink.max_train_steps * batch * (1.0 + _TRAINED_WHOLE + again)


def evaluation_forwards(config: RunConfig) -> float:
    """Forward passes, of one sample each, for all images that the evaluation draws: rows, floor, studies, cost."""
    options = config.evaluation
    guided = passes_per_step(config.teacher.guidance_scale)
    teachers = [*(guided * n for n in options.teacher_steps), *options.unguided_steps]
    students = [r.student_steps for r in config.ladder]
    more_teachers = len(config.teachers) if config.shrink is None else 1  # the smaller base
    teachers += more_teachers * [guided * n for n in options.teacher_steps[:1]]
    others = [lora.steps * passes_per_step(lora.guidance_scale) for lora in options.loras]
    rows = sum(teachers + students * (1 + len(options.onnx)) + others)
    images = options.num_images * (rows + (teachers[0] if options.floor else 0))
    seeds = options.diversity_prompts * options.diversity_seeds * (teachers[0] + sum(students + others))
    sweep = len(options.lora_scales) * sum(students)
    matrix = len(students) * sum(students) if options.matrix else 0
    studies = options.study_images * (sweep + matrix + (teachers[0] if sweep or matrix else 0))
    cost = COST_REPEATS * sum(options.cost_batch_sizes) * rows
    return images + seeds + studies + cost


def preparation_forwards(config: RunConfig) -> float:
    """Forward passes for the images that the teacher draws if data.source is a .txt file of prompts; else 0."""
    data, prompts = config.data, Path(config.data.source).expanduser()
    if prompts.suffix != ".txt" or not prompts.is_file():
        return 0.0
    count = data.num_images
    if count is None:
        with prompts.open("rb") as file:
            count = sum(bool(line.strip()) for line in file)
    return count * data.teacher_steps * passes_per_step(config.teacher.guidance_scale)


def describe(
    config: RunConfig,
    *,
    stages: Collection[str] = STAGES,
    only: tuple[int, int] | None = None,
    finished: Collection[int] = (),
    seconds_per_pass: float | None = None,
) -> str:
    """The plan as text: a line for every phase and stage, and the total.

    Args:
        config: the run.
        stages: the stages to run, a subset of STAGES.
        only: (teacher_steps, student_steps) of the one rung that is to be trained again.
        finished: student_steps of the rungs that are finished already.
        seconds_per_pass: measured time of a U-Net pass of one sample; with it the plan gives hours.
    """
    lines, passes = [f"run folder {config.run_dir}"], 0.0
    for stage in (stage for stage in STAGES if stage in stages):
        described, cost = _PARTS[stage](config, only, () if only is not None else finished)
        lines += described
        passes += cost
    if not passes:
        return "\n".join(lines)
    total = f"in all     {passes:,.0f} network passes of one sample"
    if seconds_per_pass is None:
        duration = (
            "for hours, repeat this command once the run has logged updates, or use `stepdistill run`, "
            "which times a pass first"
        )
    else:
        duration = f"about {_time(passes * seconds_per_pass)} at {seconds_per_pass:.3g} s a pass, as measured in this run"
    return "\n".join([*lines, f"{total}; {duration}"])


_Part = tuple[list[str], float]


def _describe_prepare(config: RunConfig, _only: tuple[int, int] | None, _finished: Collection[int]) -> _Part:
    cost = preparation_forwards(config)
    count = f"{config.data.num_images:,}" if config.data.num_images is not None else "all"
    by_teacher = f", drawn by the teacher: {cost:,.0f} passes" if cost else ""
    return [f"prepare    {count} images of {config.data.source}{by_teacher}"], cost


def _describe_shrink(config: RunConfig, _only: tuple[int, int] | None, _finished: Collection[int]) -> _Part:
    shrink, cost = config.shrink, shrink_forwards(config)
    if shrink is None:
        return [], 0.0
    if base_record(config) is not None:
        return ["shrink     the smaller base is there"], 0.0
    what = (
        f"without {', '.join(shrink.remove)}"
        if shrink.remove
        else f"at most {shrink.keep:g} of the parameters"
    )
    line = f"shrink     {what}: {shrink.max_train_steps:,} updates, at most {cost:,.0f} passes"
    return [line], cost


def _describe_distill(config: RunConfig, only: tuple[int, int] | None, finished: Collection[int]) -> _Part:
    lines, passes, taken = [], 0.0, taken_steps(config)
    batch = config.training.train_batch_size * config.training.gradient_accumulation_steps
    for rung in config.ladder:
        title = f"distill    {rung.teacher_steps} -> {rung.student_steps}"
        if only is not None and (rung.teacher_steps, rung.student_steps) != only:
            continue
        if rung.student_steps in finished:
            lines.append(f"{title}  finished")
            continue
        if rung.student_steps in taken and only is None:
            lines.append(f"{title}  taken over from {config.start_from}")
            continue
        for phase in rung.phases:
            each = phase_forwards(config, rung, phase)
            cost = phase.max_train_steps * batch * each
            passes += cost
            lines.append(
                f"{title}  {phase.title}: {phase.max_train_steps:,} updates x {batch} samples x {each:.7g} passes = "
                f"{cost:,.0f} passes"
            )
    if not lines and only is not None:
        ladder = ", ".join(f"{r.teacher_steps}:{r.student_steps}" for r in config.ladder)
        raise ConfigError(f"--rung: got {only[0]}:{only[1]}; allowed: {ladder}")
    return lines, passes


def _describe_export(config: RunConfig, _only: tuple[int, int] | None, _finished: Collection[int]) -> _Part:
    return [f"export     the LoRAs of {', '.join(str(r.student_steps) for r in config.ladder)} steps"], 0.0


def _describe_evaluate(config: RunConfig, _only: tuple[int, int] | None, _finished: Collection[int]) -> _Part:
    options, cost = config.evaluation, evaluation_forwards(config)
    undistilled = len(options.teacher_steps) + len(options.unguided_steps)
    rows = undistilled + len(config.ladder) + len(options.loras) + (config.shrink is not None)
    return [
        f"evaluate   {rows} rows of {options.num_images:,} images, floor and studies: {cost:,.0f} passes"
    ], cost


def _describe_report(_config: RunConfig, _only: tuple[int, int] | None, _finished: Collection[int]) -> _Part:
    return ["report     index.html, results.json, results.md, grid.png"], 0.0


_PARTS = {
    "prepare": _describe_prepare,
    "shrink": _describe_shrink,
    "distill": _describe_distill,
    "export": _describe_export,
    "evaluate": _describe_evaluate,
    "report": _describe_report,
}


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def measured_seconds_per_pass(config: RunConfig) -> float | None:
    """Seconds of a U-Net pass of one sample: the median over the updates of this ladder in log.jsonl; None if there are
    none."""
    passes = {
        (rung.student_steps, number): phase_forwards(config, rung, phase)
        for rung in config.ladder
        for number, phase in enumerate(rung.phases)
        if phase.updates_per_student_update == 1  # else its updates differ in cost
    }
    seconds = []
    for record in read_log(config.run_dir / "log.jsonl"):
        each = passes.get((record.get("rung", 0), record.get("phase", 0)))
        rate = record.get("images_per_second")
        if each and isinstance(rate, int | float) and rate > 0:
            seconds.append(1 / (rate * each))
    return statistics.median(seconds) if seconds else None
