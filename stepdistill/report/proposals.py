"""Advice as data: a finding, and proposals with the settings that carry them out. Every proposal is first tried on the run's
config; what the config rejects is not proposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stepdistill.config import ConfigError
from stepdistill.config.load import changed, setting_at, setting_text
from stepdistill.report.number_format import number
from stepdistill.teacher.ladder_fit import check_ladder_fits
from stepdistill.teacher.source import teacher_facts

_MAX_SETTINGS = 6


@dataclass(frozen=True)
class Proposal:
    """One thing to do. `changes`: the settings for it, by dotted key; they can be applied one by one, or all together."""

    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """A finding, and what to do about it; without proposals if no remedy is known."""

    finding: str
    proposals: tuple[Proposal, ...] = ()

    @property
    def remedy(self) -> str:
        """The texts of all proposals."""
        return " ".join(proposal.text for proposal in self.proposals)

    @property
    def changes(self) -> dict[str, Any]:
        """The settings of all proposals."""
        return {key: value for proposal in self.proposals for key, value in proposal.changes.items()}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `changes`."""
        return tuple(self.changes)

    @property
    def settings(self) -> tuple[str, ...]:
        """The first few settings as command-line overrides, key=value."""
        return tuple(setting_text(key, value) for key, value in self.changes.items())[:_MAX_SETTINGS]


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a run's config; None if an older version did not write the key."""
    try:
        return setting_at(config, key)
    except ConfigError:
        return None


def scaled(config: Mapping[str, Any], factor: float, *keys: str) -> dict[str, Any]:
    """New values for numeric settings: `factor` times the current value, non-integers rounded to two significant digits.

    Keys whose value is not a number, or would not change, are left out. Beside the updates of a phase, its cached_updates
    are scaled, so that each target is used as often as before.
    """
    changes: dict[str, Any] = {}
    updates = ".max_train_steps"
    kept = [key.removesuffix(updates) + ".cached_updates" for key in keys if key.endswith(updates)]
    for key in (*keys, *kept):
        today = number(setting(config, key))
        if today is not None:
            exact = factor * today
            then = max(1, round(exact)) if isinstance(today, int) else float(f"{exact:.2g}")
            changes |= {key: then} if then != today else {}
    return changes


def accepted(advice: Advice, config: Mapping[str, Any]) -> Advice:
    """The advice with only those proposals whose settings the config accepts, both one by one and all together."""
    usable = tuple(proposal for proposal in advice.proposals if _is_accepted(config, proposal.changes))
    return replace(advice, proposals=usable)


def _is_accepted(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    trials = [changes, *({key: value} for key, value in changes.items())]
    return all(_parses(config, trial) for trial in trials)


def _parses(config: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    """Whether the changed config is valid and, if the teacher's files can be read, fits the teacher."""
    try:
        then = changed(config, changes)
    except ConfigError:
        return False
    try:
        teacher = teacher_facts(then)
    except ConfigError:
        return True
    try:
        check_ladder_fits(then, teacher)
    except ConfigError:
        return False
    return True
