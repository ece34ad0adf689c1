"""What a run will do, and what it costs in U-Net forwards, before it starts. No torch."""

from collections.abc import Collection

from stepdistill.config import Phase, RunConfig, Rung
from stepdistill.teacher_source import teacher_timesteps

# In units of one forward of the bare U-Net per sample (section 5 of the recipe, computed on SDXL): LoRA forward and
# backward, then what the discriminator adds.
_LORA_FORWARD, _ENCODER = 1.083, 0.434
_STUDENT = _LORA_FORWARD + 1.268
_DISCRIMINATOR = {"paired": 5.25, "single": 3.55}
_FROZEN_TRUNK = -2.2  # no backward into it, and no adapter: single 5.7 instead of 7.9
_CLEAN = -1


COST_REPEATS = 2
"""How often a row's cost is measured at each batch."""


def phase_forwards(config: RunConfig, rung: Rung, phase: Phase) -> float:
    """Forwards per sample and update of one phase."""
    if phase.objective == "convert":
        return 1 + _STUDENT
    return _teacher_forwards(config, rung, phase) + _STUDENT + _discriminator_forwards(rung, phase)


def _teacher_forwards(config: RunConfig, rung: Rung, phase: Phase) -> float:
    if phase.objective in _DISCRIMINATOR and phase.discriminator.real == "data":
        return 0.0
    teacher_steps = phase.teacher_steps or rung.teacher_steps
    earlier = [r.student_steps for r in config.ladder if r.student_steps > rung.student_steps]
    guided = teacher_steps not in earlier and config.teacher.guidance_scale > 1
    asked = min(1.0, (phase.cached_updates or phase.max_train_steps) / phase.max_train_steps)
    moves = _teacher_substeps(rung, teacher_steps, teacher_timesteps(config))
    return asked * moves * (2 if guided else 1)


def _discriminator_forwards(rung: Rung, phase: Phase) -> float:
    if phase.objective not in _DISCRIMINATOR:
        return 0.0
    options, found = phase.discriminator, _DISCRIMINATOR[phase.objective]
    if options.trunk == "frozen":
        found += _FROZEN_TRUNK
    return found


def _teacher_substeps(rung: Rung, teacher_steps: int, num_train_timesteps: int) -> float:
    """Mean number of the teacher's moves within one of the student's, over the nodes that the student is trained at."""
    nodes, teacher, student = (
        _trailing(steps, num_train_timesteps)
        for steps in (rung.node_steps or rung.student_steps, teacher_steps, rung.student_steps)
    )
    student.append(_CLEAN)
    moves = 0
    for node in nodes:
        stepped = max(_CLEAN, node - round(num_train_timesteps / rung.student_steps))
        end = student[student.index(node) + 1] if node in student else stepped
        moves += 1 + sum(end < t < node for t in teacher)
    return moves / len(nodes)


def _trailing(steps: int, num_train_timesteps: int) -> list[int]:
    return [round(num_train_timesteps - k * (num_train_timesteps / steps)) - 1 for k in range(steps)]


def training_forwards(config: RunConfig, *, finished: Collection[int] = ()) -> float:
    """Forwards of all phases, in samples, without the rungs (their student_steps) that are finished."""
    batch = config.training.train_batch_size * config.training.gradient_accumulation_steps
    return batch * sum(
        phase.max_train_steps * phase_forwards(config, rung, phase)
        for rung in config.ladder
        if rung.student_steps not in finished
        for phase in rung.phases
    )


def evaluation_forwards(config: RunConfig) -> float:
    """Forwards of all images that the evaluation draws, in samples: rows, floor, studies, cost."""
    options = config.evaluation
    guided = 2 if config.teacher.guidance_scale > 1 else 1
    teachers = [*(guided * n for n in options.teacher_steps), *options.unguided_steps]
    students = [r.student_steps for r in config.ladder]
    others = [lora.steps * (2 if lora.guidance_scale > 1 else 1) for lora in options.loras]
    rows = sum(teachers + students + others)
    images = options.num_images * (rows + (teachers[0] if options.floor else 0))
    seeds = options.diversity_prompts * options.diversity_seeds * (teachers[0] + sum(students + others))
    sweep = len(options.lora_scales) * sum(students)
    matrix = len(students) * sum(students) if options.matrix else 0
    studies = options.study_images * (sweep + matrix + (teachers[0] if sweep or matrix else 0))
    cost = COST_REPEATS * sum(options.cost_batch_sizes) * rows
    return images + seeds + studies + cost


def describe(config: RunConfig) -> str:
    """What would run, a line per phase."""
    lines = [
        f"run folder {config.run_dir}",
        f"prepare    {config.data.num_images or 'all'} images of {config.data.source}",
    ]
    for rung in config.ladder:
        for phase in rung.phases:
            lines.append(
                f"distill    {rung.teacher_steps} -> {rung.student_steps}  {phase.objective}: "
                f"{phase.max_train_steps} updates of {phase_forwards(config, rung, phase):.1f} U-Net forwards a sample"
            )
    rungs = ", ".join(str(r.student_steps) for r in config.ladder)
    lines.append(f"export     the LoRAs of {rungs} steps")
    options = config.evaluation
    undistilled = len(options.teacher_steps) + len(options.unguided_steps)
    rows = undistilled + len(config.ladder) + len(options.loras)
    lines.append(f"evaluate   {rows} rows of {config.evaluation.num_images} images")
    lines.append("report     index.html, results.json, results.md, grid.png")
    return "\n".join(lines)
