"""Which settings of a run may change after it has started, and which a checkpoint depends on. No torch.

config/section.py's Affects says it of each setting:
    EVERY_RUNG  may not change
    ITS_RUNG    may change until its rung is finished; a checkpoint of that rung may depend on it
    SPLIT       may change; ladder/train.py checks that an update has as many samples as before
    NOTHING     may change
"""

from collections.abc import Iterable, Mapping
from typing import Any

from stepdistill.config import RunConfig
from stepdistill.config.saved import resolved
from stepdistill.config.schema import affects
from stepdistill.config.section import Affects
from stepdistill.disk.durable import sha256_json

Difference = tuple[str, Any, Any]
"""A dotted key, its value before and its value now; None where the key is missing."""
_MAX_SHOWN = 8
_LATER_DEFAULTS: dict[str, Any] = {
    "start_from": None,
    "objectives": None,
    "head_width": None,
    "optimizer": "adam",
    "final_weight": None,
    "schedule": "linear",
    "balance": "none",
    "init": None,
    "teachers": None,
    "teacher": "rung",
    "teacher_decay": 0.99,
    "taps": ["middle"],
    "kernel": "gaussian",
    "between": "patches",
    "critic_updates": None,
    "inputs": "data",
    "prompt_dropout": 0.0,
    "shrink": None,
    "fake_score_learning_rate": None,
    "text_dtype": "float32",
}
"""Settings that earlier versions did not have, by their last name: at these values they are not part of a hash."""


def config_hash(config: RunConfig) -> str:
    """A hash of all settings that a run's weights depend on; the run's place, exports and evaluation do not change it."""
    written = flat(resolved(config.as_written))
    settings = {k: v for k, v in written.items() if affects(k) is not Affects.NOTHING}
    return sha256_json({k: v for k, v in settings.items() if not _is_later_default(k, v)})


def _is_later_default(key: str, value: Any) -> bool:
    """Whether a setting is one that earlier versions did not have, and has the value that stands for what they did."""
    name = key.rpartition(".")[2]
    return name in _LATER_DEFAULTS and value in (_LATER_DEFAULTS[name], None, [], ())


def forbidden_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, finished: Iterable[int]
) -> list[Difference]:
    """The settings that differ between two resolved configs and may not.

    finished: student_steps of the finished rungs. Their settings, and those of the rungs before them, may not change.
    """
    ladder, done = before.get("ladder"), list(finished)
    rungs = ladder if isinstance(ladder, list) else []  # a damaged config.yaml may hold anything
    steps = [rung.get("student_steps") if isinstance(rung, dict) else None for rung in rungs]
    trained = max((index + 1 for index, count in enumerate(steps) if count in done), default=0)
    return [
        change
        for change in differences(flat(before), flat(now))
        if affects(change[0]) is Affects.EVERY_RUNG
        or (affects(change[0]) is Affects.ITS_RUNG and _rung_number(change[0]) < trained)
    ]


def _rung_number(key: str) -> int:
    """2 for ladder.2.phases.0.objective."""
    parts = key.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0


def settings_behind(config: RunConfig, *, position: int, phase: int, step: int) -> dict[str, Any]:
    """The settings, by dotted key, that the state after `step` updates of phase number `phase` depends on.

    position: the rung's index in the ladder. Earlier rungs stand for themselves: what counts is the LoRA they left.
    """
    begun = phase + (step > 0)
    phases = config.ladder[position].phases
    prefix = f"ladder.{position}."
    settings = {}
    for key, value in flat(resolved(config.as_written)).items():
        part = key.removeprefix(prefix).split(".")
        is_of_rung = key.startswith(prefix) and (part[0] != "phases" or int(part[1]) < begun)
        if affects(key) is Affects.EVERY_RUNG or is_of_rung:
            settings[key] = value
    # a discriminator's state is in the checkpoint only if a later phase starts from it
    settings[f"{prefix}phases, one with discriminator.start: carried"] = any(
        p.discriminator.start == "carried" for p in phases[begun:]
    )
    return settings


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings by dotted key whose values differ; one that an earlier version did not have is at what that did."""
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    keys = [k for k in keys if k in before or not _is_later_default(k, now[k])]
    if now.get("data.held_out") is None and "data.held_out" in keys:
        keys.remove("data.held_out")  # the run continues with the share that it was started with
    return [(k, before.get(k), now.get(k)) for k in keys]


def differences_text(changes: list[Difference]) -> str:
    """The differences in one line, such as "lora.rank: 16 -> 8, seed: 0 -> 1"; the first few if there are many."""
    shown = ", ".join(f"{key}: {before!r} -> {now!r}" for key, before, now in changes[:_MAX_SHOWN])
    return f"{shown} and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else shown


def settings_of_every_rung(config: RunConfig) -> dict[str, Any]:
    """The settings, by dotted key, that everything trained in a run depends on."""
    written = flat(resolved(config.as_written))
    return {key: value for key, value in written.items() if affects(key) is Affects.EVERY_RUNG}


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Plain data by dotted key; a list that holds no mapping is one value."""
    if isinstance(value, dict):
        return {
            k: v
            for name, part in value.items()
            for k, v in flat(part, f"{key}.{name}" if key else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for index, part in enumerate(value) for k, v in flat(part, f"{key}.{index}").items()}
    return {key: value}
