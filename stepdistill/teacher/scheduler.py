"""Checks without torch that a teacher's scheduler_config.json describes a noise schedule."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.messages import short

MAX_TIMESTEPS = 10_000
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
DYNAMIC_SHIFT = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""The values of FlowMatchEulerDiscreteScheduler on which a dynamic shift depends, with its defaults."""
_SHIFT_TYPES = ("exponential", "linear")
_OTHER_FLOWS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Options of FlowMatchEulerDiscreteScheduler that place its steps in another way."""
_BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def is_flow_scheduler(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config describes a rectified flow, and not a noise schedule of betas."""
    return str(config.get("_class_name")).startswith("FlowMatch")


def scheduler_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """The values in a scheduler's config that rule out training, each with what is allowed.

    Betas are the variances of the noise that each step adds (Ho et al. 2020, arXiv 2006.11239): above 0 and below 1.
    """
    if is_flow_scheduler(config):
        yield from _flow_problems(config)
        return
    trained = config.get("trained_betas")
    if trained is None and "beta_start" not in config:
        yield (
            f"the scheduler {short(config.get('_class_name'))} without betas; "
            f"allowed: noise schedules like Stable Diffusion's"
        )
        return
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTION_TYPES:
        yield f"a scheduler with prediction_type: {short(kind)}; allowed: {', '.join(_PREDICTION_TYPES)}"
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if not isinstance(zero_snr, bool | None):
        yield f"a scheduler with rescale_betas_zero_snr: {short(zero_snr)}; allowed: true, false"
    count = config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MAX_TIMESTEPS:
        yield f"a scheduler with num_train_timesteps: {short(count)}; allowed: a whole number from 2 to {MAX_TIMESTEPS}"
    elif trained is not None:
        yield from _listed(trained, count)
    else:
        yield from _from_ends(config)


def _flow_problems(config: Mapping[str, Any]) -> Iterator[str]:
    shift, count = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        yield f"a scheduler with shift: {short(shift)}; allowed: a number above 0"
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MAX_TIMESTEPS:
        yield f"a scheduler with num_train_timesteps: {short(count)}; allowed: a whole number from 2 to {MAX_TIMESTEPS}"
    yield from _dynamic_problems(config) if config.get("use_dynamic_shifting") else ()
    for key in _OTHER_FLOWS:
        if config.get(key):
            yield f"a scheduler with {key}: {short(config[key])}; allowed: without {', '.join(_OTHER_FLOWS)}"


def _dynamic_problems(config: Mapping[str, Any]) -> Iterator[str]:
    values = {key: config.get(key, default) for key, default in DYNAMIC_SHIFT.items()}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            yield f"a scheduler with {key}: {short(value)}; allowed: a number above 0"
            return
    if values["base_image_seq_len"] == values["max_image_seq_len"]:
        yield f"a scheduler with max_image_seq_len: {values['max_image_seq_len']}; allowed: not base_image_seq_len"
    if config.get("time_shift_type", "exponential") not in _SHIFT_TYPES:
        yield f"a scheduler with time_shift_type: {short(config['time_shift_type'])}; allowed: {', '.join(_SHIFT_TYPES)}"


def _listed(trained: object, count: int) -> Iterator[str]:
    if not isinstance(trained, list) or len(trained) != count:
        got = f"{len(trained)} numbers" if isinstance(trained, list) else short(trained)
        yield f"a scheduler with trained_betas: {got}; allowed: {count}, one for each training timestep"
        return
    odd = next((beta for beta in trained if not _is_beta(beta)), None)
    if odd is not None or not all(map(_is_beta, trained)):
        yield f"a scheduler with {short(odd)} among its trained_betas; allowed: numbers above 0 and below 1"


def _from_ends(config: Mapping[str, Any]) -> Iterator[str]:
    schedule = config.get("beta_schedule", "scaled_linear")
    if schedule not in _BETA_SCHEDULES:
        yield f"a scheduler with beta_schedule: {short(schedule)}; allowed: {', '.join(_BETA_SCHEDULES)}"
    start, end = config["beta_start"], config.get("beta_end")
    for key, beta in (("beta_start", start), ("beta_end", end)):
        if not _is_beta(beta):
            yield f"a scheduler with {key}: {short(beta)}; allowed: a number above 0 and below 1"
            return
    if start > end:
        yield f"a scheduler with beta_start: {start} and beta_end: {end}; allowed: beta_start <= beta_end"


def _is_beta(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 1  # True counts as 1 and False as 0: neither passes
