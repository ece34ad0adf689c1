"""A ladder beside its teacher: what each rung predicts, and what that teacher's noise schedule does not allow. No torch."""

from collections.abc import Iterator
from pathlib import Path

from stepdistill.config import ConfigError, Phase, RunConfig
from stepdistill.models.folder import is_zero_snr, num_train_timesteps, prediction_type


def prediction_types(config: RunConfig, base_prediction_type: str) -> list[str]:
    """What each rung's student predicts: its own setting, or as the rung before."""
    kinds, kind = [], base_prediction_type
    for rung in config.ladder:
        kind = rung.prediction_type or kind
        kinds.append(kind)
    return kinds


def loss_space_of(phase: Phase, student_prediction_type: str) -> str:
    """Where a phase's mse is measured: `auto` is what its student predicts."""
    return student_prediction_type if phase.loss_space == "auto" else phase.loss_space


def check_ladder(config: RunConfig, folder: Path) -> None:
    """ConfigError where the ladder or the table asks for what the teacher in `folder` cannot do."""
    _check_timesteps(config, num_train_timesteps(folder))
    if is_zero_snr(folder) and prediction_type(folder) == "epsilon":
        raise ConfigError(
            f"teacher.path: got {config.teacher.path!r}, which predicts epsilon with zero terminal SNR: it says nothing of "
            f"the picture at its first step; allowed: v_prediction or sample in its scheduler_config.json, or no "
            f"rescale_betas_zero_snr"
        )
    kinds = prediction_types(config, prediction_type(folder))
    for index, (before, kind) in enumerate(zip([prediction_type(folder), *kinds], kinds, strict=False)):
        _check_conversion(config, index, before, kind)
        if is_zero_snr(folder):
            _check_zero_snr(config, index, kind)


def unfit_settings(config: RunConfig, folder: Path) -> Iterator[tuple[str, str]]:
    """Settings made for students that predict epsilon, where a student predicts v or x0: what each does, and the remedy."""
    for index, (rung, kind) in enumerate(
        zip(config.ladder, prediction_types(config, prediction_type(folder)), strict=True)
    ):
        name = {"v_prediction": "v", "sample": "x0"}.get(kind)
        if name is None:
            continue
        key = f"ladder.{index}.start_timestep"
        if rung.start_timestep is not None:
            yield (
                f"{key}: {rung.start_timestep} makes an error of epsilon weigh less; this rung predicts {name}, which says "
                f"what the picture is at pure noise too",
                f"{key}=null",
            )
        for number, phase in enumerate(rung.phases):
            key = f"ladder.{index}.phases.{number}.loss_space"
            if "mse" in phase.kinds and phase.loss_space == "epsilon":
                yield (
                    f"{key}: epsilon hardly weighs the noisiest steps of a student that predicts {name}",
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
            f"ladder.{index}.prediction_type: got {kind}, but what its student begins with predicts {before}, and the first "
            f'phase, "{first}", does not change that; allowed: {before}, or a first phase {{objective: convert}}'
        )


def _check_zero_snr(config: RunConfig, index: int, kind: str) -> None:
    if kind == "epsilon":
        raise ConfigError(
            f"ladder.{index}.prediction_type: got epsilon, which says nothing of the picture at the first step of a "
            f"teacher with zero terminal SNR; allowed: v_prediction, sample"
        )
    for number, phase in enumerate(config.ladder[index].phases):
        if loss_space_of(phase, kind) == "epsilon":
            raise ConfigError(
                f"ladder.{index}.phases.{number}.loss_space: got epsilon, which weighs the first step of a teacher "
                f"with zero terminal SNR by 0; allowed: auto, prev_sample, sample, v_prediction, truncated_snr"
            )
