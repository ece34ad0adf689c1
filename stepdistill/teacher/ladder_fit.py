"""Checks a ladder against its teacher's noise schedule and prediction type. No torch."""

import struct
from collections.abc import Iterator

from stepdistill.config import ConfigError, RunConfig
from stepdistill.teacher.facts import TeacherFacts


def check_ladder_fits(config: RunConfig, teacher: TeacherFacts) -> None:
    """ConfigError if the ladder, the evaluation or the data ask for what the teacher's schedule or output does not allow."""
    _check_timesteps(config, teacher.num_train_timesteps)
    if teacher.matches_flows:
        _check_flow(config, teacher)
        return
    if teacher.is_zero_snr and teacher.prediction_type == "epsilon":
        raise ConfigError(
            f"teacher.path: got {config.teacher.path!r}, which predicts epsilon with zero terminal SNR: at its first "
            f"step epsilon says nothing about the image; allowed: v_prediction or sample in its scheduler_config.json, or "
            f"no rescale_betas_zero_snr"
        )
    kinds = config.prediction_types(teacher.prediction_type)
    for index, (before, kind) in enumerate(zip([teacher.prediction_type, *kinds], kinds, strict=False)):
        _check_conversion(config, index, before, kind)
        if teacher.is_zero_snr:
            _check_zero_snr(config, index, kind)


def check_side(side: int, multiple: int) -> None:
    """ConfigError if an image side in pixels is not a multiple of what the teacher's VAE and network need."""
    if side % multiple:
        nearest = max(multiple, round(side / multiple) * multiple)
        raise ConfigError(f"data.resolution: got {side}; allowed: multiples of {multiple}, such as {nearest}")


def _check_flow(config: RunConfig, teacher: TeacherFacts) -> None:
    """ConfigError for what the schedulers of flows cannot sample: another output, or a start that is told another time. Also
    for what there is for U-Nets alone."""
    if config.shrink is not None:
        raise ConfigError("shrink: got a value, but blocks can be removed from U-Nets alone; allowed: null")
    if config.teacher.unconditional == "zeros":
        raise ConfigError(
            "teacher.unconditional: got zeros, but this teacher's pipeline encodes an empty prompt; allowed: auto, empty"
        )
    if config.data.buckets and teacher.scheduler.get("use_dynamic_shifting"):
        raise ConfigError(
            "data.buckets: got true, but this teacher's shift depends on the image size, and a student has one shift; "
            "allowed: false"
        )
    _check_nodes(config, teacher)
    for index, rung in enumerate(config.ladder):
        for name in ("prediction_type", "start_timestep"):
            if getattr(rung, name) is not None:
                raise ConfigError(
                    f"ladder.{index}.{name}: got {getattr(rung, name)}, but this teacher matches flows, whose students "
                    f"predict the velocity at every step's own time; allowed: null"
                )
        for number, phase in enumerate(rung.phases):
            if "mse" in phase.kinds and phase.loss_space == "epsilon":
                raise ConfigError(
                    f"ladder.{index}.phases.{number}.loss_space: got epsilon, which gives zero weight to the first "
                    f"step of a flow, where the sample is pure noise; allowed: velocity, auto, prev_sample, sample"
                )


def _check_nodes(config: RunConfig, teacher: TeacherFacts) -> None:
    """ConfigError if the shift of a flow is so large that the network is given one time, in float32, for several steps."""
    if teacher.scheduler.get("use_dynamic_shifting"):  # which is far from that large
        return
    shift, count = float(teacher.scheduler.get("shift", 1.0)), teacher.num_train_timesteps
    for key, steps in _step_counts(config):
        ways = (k / steps for k in range(1, steps + 1))
        times = [count * shift * way / (1 + (shift - 1) * way) for way in ways]
        if len(set(struct.unpack(f"{steps}f", struct.pack(f"{steps}f", *times)))) < steps:
            raise ConfigError(
                f"{key}: got {steps}, but with this teacher's shift of {shift:g} some of these steps fall together; "
                f"allowed: fewer steps, or a scheduler_config.json with a smaller shift"
            )


def unfit_settings(config: RunConfig, teacher: TeacherFacts) -> Iterator[tuple[str, str]]:
    """Settings meant for students that predict epsilon, on rungs that predict v or x0: (effect of the setting, remedy)."""
    for index, (rung, kind) in enumerate(
        zip(config.ladder, config.prediction_types(teacher.prediction_type), strict=True)
    ):
        name = {"v_prediction": "v", "sample": "x0"}.get(kind)
        if name is None:
            continue
        key = f"ladder.{index}.start_timestep"
        if rung.start_timestep is not None:
            yield (
                f"{key}: {rung.start_timestep} makes an error of epsilon weigh less, but this rung predicts {name}, which "
                f"determines the image even at pure noise",
                f"{key}=null",
            )
        if rung.teacher_steps == rung.student_steps and kind == "v_prediction" and not teacher.is_zero_snr:
            continue  # guidance alone, which epsilon taught better: eval/recipe_notes.md
        for number, phase in enumerate(rung.phases):
            key = f"ladder.{index}.phases.{number}.loss_space"
            if "mse" in phase.kinds and phase.loss_space == "epsilon":
                yield (
                    f"{key}: epsilon gives hardly any weight to the noisiest steps of a student that predicts {name}",
                    f"{key}=auto",
                )


def _check_timesteps(config: RunConfig, count: int) -> None:
    for key, steps in _step_counts(config):
        if steps > count:
            raise ConfigError(
                f"{key}: got {steps}; allowed: 1 to {count}, the num_train_timesteps of the teacher's scheduler"
            )
    for index, rung in enumerate(config.ladder):
        if rung.start_timestep is not None and rung.start_timestep >= count:
            raise ConfigError(
                f"ladder.{index}.start_timestep: got {rung.start_timestep}; allowed: 1 to {count - 1}, the last timestep of "
                f"the teacher's scheduler"
            )


def _step_counts(config: RunConfig) -> Iterator[tuple[str, int]]:
    for index, rung in enumerate(config.ladder):
        yield f"ladder.{index}.teacher_steps", rung.teacher_steps
        yield f"ladder.{index}.node_steps", rung.node_steps or 1
    for key in ("teacher_steps", "unguided_steps"):
        for number, steps in enumerate(getattr(config.evaluation, key)):
            yield f"evaluation.{key}.{number}", steps
    for number, lora in enumerate(config.evaluation.loras):
        yield f"evaluation.loras.{number}.steps", lora.steps
    yield "data.teacher_steps", config.data.teacher_steps if config.data.source.endswith(".txt") else 1


def _check_conversion(config: RunConfig, index: int, before: str, kind: str) -> None:
    first = config.ladder[index].phases[0].title
    if kind != before and first != "convert":
        raise ConfigError(
            f"ladder.{index}.prediction_type: got {kind}, but its student begins as a model that predicts {before}, and the "
            f'first phase, "{first}", does not change that; allowed: {before}, or a first phase {{objective: convert}}'
        )


def _check_zero_snr(config: RunConfig, index: int, kind: str) -> None:
    if kind == "epsilon":
        raise ConfigError(
            f"ladder.{index}.prediction_type: got epsilon, which says nothing about the image at the first step of a "
            f"teacher with zero terminal SNR; allowed: v_prediction, sample"
        )
    for number, phase in enumerate(config.ladder[index].phases):
        if "mse" in phase.kinds and phase.loss_space_for(kind) == "epsilon":
            raise ConfigError(
                f"ladder.{index}.phases.{number}.loss_space: got epsilon, which gives zero weight to the first step of a "
                f"teacher with zero terminal SNR; allowed: auto, prev_sample, sample, v_prediction, truncated_snr"
            )
