"""Times actions. What is compared runs in turn, so that a machine that becomes slower meanwhile slows all of it."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Action = Callable[[], object]


def seconds_of(action: Action) -> float:
    """Seconds of one call, until the GPU is done too."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rounds(actions: Mapping[str, Action], count: int) -> list[dict[str, float]]:
    """Seconds of each action in each of `count` rounds, after one round that is not counted."""
    for action in actions.values():
        action()
    return [{name: seconds_of(action) for name, action in actions.items()} for _ in range(count)]


def medians(timed: list[dict[str, float]]) -> dict[str, float]:
    """The median seconds of each action."""
    return {name: statistics.median(each[name] for each in timed) for name in timed[0]}


def median_seconds(action: Action, count: int) -> float:
    """Median seconds of `count` calls, after one call that is not counted."""
    return medians(rounds({"action": action}, count))["action"]
