"""Checks of the `ladder` section: that the rungs follow each other, and that each phase fits its rung. No torch."""

import math
from collections.abc import Iterator

from stepdistill.config.ladder import Phase, Rung, WeightedObjective
from stepdistill.config.objective_kinds import OBJECTIVES, compares_features, is_adversarial
from stepdistill.config.section import ConfigError, Section

_MOST_USES = 3


def check_ladder(ladder: tuple[Rung, ...]) -> None:
    """ConfigError if the rungs do not follow each other, or if a phase does not fit its rung."""
    for index, rung in enumerate(ladder):
        _check_rung(index, ladder)
        for number, phase in enumerate(rung.phases):
            key = f"ladder.{index}.phases.{number}"
            check_objectives(key, phase)
            _check_phase(key, phase, rung, ladder[:index])
            _check_convert(f"{key}.objective", phase, rung, number)
            _check_start(f"{key}.discriminator.start", phase, rung.phases[:number])


def between_samples(ladder: tuple[Rung, ...]) -> Iterator[str]:
    """The keys of objectives that relate the samples of a micro-batch."""
    for index, rung in enumerate(ladder):
        for number, phase in enumerate(rung.phases):
            for place, of in enumerate(phase.objectives):
                if of.kind == "relations" and of.between == "samples":
                    yield f"ladder.{index}.phases.{number}.objectives.{place}.between"


def unused_settings(ladder: tuple[Rung, ...]) -> Iterator[tuple[str, str]]:
    """Settings of phases that differ from the default but that no objective of the phase reads: (what is said, remedy)."""
    for index, rung in enumerate(ladder):
        for number, phase in enumerate(rung.phases):
            unread = (
                [] if phase.adversary else [f"discriminator.{name}" for name in _changed(phase.discriminator)]
            )
            if "mse" not in phase.kinds and "loss_space" in _changed(phase):
                unread.append("loss_space")
            if not phase.matches_distributions:
                unread += [name for name in _changed(phase) if name == "fake_score_learning_rate"]
            if phase.teacher == "ema" and not phase.asks_teacher:
                unread.append("teacher")
            if phase.teacher == "rung" and "teacher_decay" in _changed(phase):
                unread.append("teacher_decay")
            for place, of in enumerate(phase.objectives):
                unread += [f"objectives.{place}.{name}" for name in _unread(of)]
            for name in unread:
                key = f"ladder.{index}.phases.{number}.{name}"
                yield f"{key} changes nothing, because {phase.title} does not read it", f"leave {key} out"


def often_used_targets(ladder: tuple[Rung, ...]) -> Iterator[tuple[str, str]]:
    """Phases that use each target more often than has been measured: (what is said, remedy)."""
    for index, rung in enumerate(ladder):
        for number, phase in enumerate(rung.phases):
            uses = phase.max_train_steps / (phase.cached_updates or phase.max_train_steps)
            if uses > _MOST_USES:
                key = f"ladder.{index}.phases.{number}.cached_updates"
                about = f"{key}: {phase.max_train_steps} updates use each target {uses:.3g} times; only twice is measured"
                yield about, f"{key}={math.ceil(phase.max_train_steps / 2)}"


def _unread(of: WeightedObjective) -> list[str]:
    """The names of an objective's fields that differ from the default and that it does not read."""
    readers = {
        "schedule": of.final_weight is not None,
        "taps": compares_features(of.kind),
        "kernel": of.kind == "kernel",
        "between": of.kind == "relations",
    }
    return [name for name in _changed(of) if not readers.get(name, True)]


def _changed(section: Section) -> list[str]:
    """The names of a section's fields whose values are not the default ones."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) != field.get_default(call_default_factory=True)
    ]


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n) if n % k == 0]


def _check_rung(index: int, ladder: tuple[Rung, ...]) -> None:
    rung, key = ladder[index], f"ladder.{index}"
    allowed = _divisors(rung.teacher_steps) + ([] if index else [rung.teacher_steps])
    if rung.student_steps not in allowed:
        nearest = min(allowed, key=lambda n: abs(n - rung.student_steps), default=1)
        raise ConfigError(
            f"{key}.student_steps: got {rung.student_steps}, which is no proper divisor of {rung.teacher_steps} teacher "
            f"steps; allowed: {', '.join(map(str, allowed))}; nearest: {nearest}"
        )
    if index and rung.teacher_steps != ladder[index - 1].student_steps:
        raise ConfigError(
            f"{key}.teacher_steps: got {rung.teacher_steps}; allowed: {ladder[index - 1].student_steps}, "
            f"the student_steps of the rung before"
        )
    if rung.node_steps is not None and rung.node_steps % rung.student_steps:
        raise ConfigError(
            f"{key}.node_steps: got {rung.node_steps}; allowed: multiples of student_steps {rung.student_steps}"
        )
    if rung.start_timestep is not None and (rung.student_steps, rung.node_steps or 1) != (1, 1):
        raise ConfigError(
            f"{key}.start_timestep: got {rung.start_timestep}; allowed: only on a rung of 1 student step, without node_steps"
        )


def _check_phase(key: str, phase: Phase, rung: Rung, earlier: tuple[Rung, ...]) -> None:
    allowed = [r.student_steps for r in earlier if r.student_steps % rung.student_steps == 0] or [
        rung.teacher_steps
    ]
    if phase.teacher_steps is not None and phase.teacher_steps not in allowed:
        raise ConfigError(
            f"{key}.teacher_steps: got {phase.teacher_steps}; allowed: {', '.join(map(str, allowed))}, "
            f"the student_steps of earlier rungs"
        )
    if phase.teacher == "ema":
        _check_self_teacher(key, phase, earlier)
    _check_updates(key, phase)
    _check_inputs(key, phase, rung)
    if phase.kinds != ("mse",) and phase.cached_updates is not None:
        raise ConfigError(
            f"{key}.cached_updates: got {phase.cached_updates}; allowed: only on an mse phase, and this is {phase.title}"
        )


def _check_updates(key: str, phase: Phase) -> None:
    if phase.critic_updates not in (None, 1) and not phase.critics:
        raise ConfigError(
            f"{key}.critic_updates: got {phase.critic_updates}, but {phase.title} has neither discriminator nor fake score; "
            f"allowed: 1"
        )
    if not phase.student_updates:
        raise ConfigError(
            f"{key}.max_train_steps: got {phase.max_train_steps}, in which the student would not learn; allowed: at least "
            f"{phase.updates_per_student_update}, the critic_updates of {phase.title}"
        )


def _check_inputs(key: str, phase: Phase, rung: Rung) -> None:
    read_as_sampled = next((kind for kind in ("output", "denoise") if kind in phase.kinds), None)
    if read_as_sampled and rung.start_timestep is not None:
        raise ConfigError(
            f"{key}.objectives: got {read_as_sampled} on a rung with start_timestep {rung.start_timestep}, where the output "
            f"is read at another timestep than that of x_t; allowed: mse, which compares samples"
        )
    if phase.inputs == "data":
        return
    if "denoise" in phase.kinds or ("paired" in phase.kinds and phase.discriminator.real == "data"):
        other = "denoise" if "denoise" in phase.kinds else "paired and discriminator.real: data"
        raise ConfigError(
            f"{key}.inputs: got own with {other}, whose data do not belong to the student's own x_t; allowed: data"
        )
    if rung.node_steps not in (None, rung.student_steps):
        raise ConfigError(
            f"{key}.inputs: got own on a rung with node_steps {rung.node_steps}; allowed: data, as a sampler of "
            f"{rung.student_steps} steps does not come to the other nodes"
        )
    if phase.cached_updates is not None or "convert" in phase.kinds:
        other = "convert" if "convert" in phase.kinds else "cached_updates"
        raise ConfigError(
            f"{key}.inputs: got own with {other}, which needs inputs that stay as they are; allowed: data"
        )


def _check_self_teacher(key: str, phase: Phase, earlier: tuple[Rung, ...]) -> None:
    if not earlier:
        raise ConfigError(
            f"{key}.teacher: got ema on the first rung, which learns the base's guidance; allowed: rung"
        )
    if phase.teacher_steps is not None or phase.cached_updates is not None or "convert" in phase.kinds:
        other = "convert" if "convert" in phase.kinds else "teacher_steps or cached_updates"
        raise ConfigError(
            f"{key}.teacher: got ema with {other}, which needs a teacher that stays as it is; allowed: rung"
        )


def check_objectives(key: str, phase: Phase) -> None:
    """ConfigError if a phase has no objective, both `objective` and `objectives`, or objectives that do not go together."""
    if not phase.weighted:
        raise ConfigError(f"{key}.objective: got nothing; allowed: {', '.join(OBJECTIVES)}")
    if phase.balance == "gradient" and len(phase.weighted) < 2:
        raise ConfigError(
            f"{key}.balance: got gradient; allowed: none, as {phase.title} is alone and has nothing to be balanced against"
        )
    if not phase.objectives:
        return
    key = f"{key}.objectives"
    if phase.objective is not None:
        raise ConfigError(
            f"{key}: got a list beside objective: {phase.objective}; allowed: one of the two keys"
        )
    twice = next((kind for kind in phase.kinds if phase.kinds.count(kind) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key}: got {twice} twice; allowed: each kind once, with its weight")
    if sum(map(is_adversarial, phase.kinds)) > 1:
        raise ConfigError(
            f"{key}: got paired and single; allowed: one of them, as a phase has one discriminator"
        )
    for index, of in enumerate(phase.objectives):
        if of.weight == 0 and not of.final_weight:
            raise ConfigError(
                f"{key}.{index}.weight: got 0; allowed: a number above 0, or 0 with a final_weight above 0"
            )
    if "convert" in phase.kinds and len(phase.kinds) > 1:
        raise ConfigError(
            f"{key}: got convert beside {', '.join(k for k in phase.kinds if k != 'convert')}; allowed: convert alone, "
            f"since the student must first learn another prediction type"
        )


def _check_convert(key: str, phase: Phase, rung: Rung, number: int) -> None:
    if "convert" not in phase.kinds:
        return
    if rung.prediction_type is None:
        raise ConfigError(
            f'{key}: got "convert", on a rung without prediction_type; allowed: only on a rung that has one, such as '
            f"prediction_type: sample"
        )
    if number:
        raise ConfigError(
            f'{key}: got "convert" after "{rung.phases[number - 1].title}", whose training it would undo, because it learns '
            f"from the rung before; allowed: as the first phase of its rung"
        )


def _check_start(key: str, phase: Phase, before: tuple[Phase, ...]) -> None:
    options = phase.discriminator
    if options.start == "fresh":
        return
    if phase.adversary is None:
        raise ConfigError(
            f"{key}: got carried; allowed: only on a paired or single phase, and this is {phase.title}"
        )
    previous = next((p for p in reversed(before) if p.adversary is not None), None)
    if previous is None:
        raise ConfigError(
            f"{key}: got carried; allowed: fresh, as this is the first adversarial phase of its rung"
        )
    if previous.discriminator.trunk != options.trunk:
        raise ConfigError(
            f"{key}: got carried; allowed: only with the same trunk as the adversarial phase before, which has "
            f"{previous.discriminator.trunk}; this has {options.trunk}"
        )
    same_heads = (previous.adversary, previous.discriminator.heads) == (phase.adversary, options.heads)
    if options.trunk == "frozen" and not same_heads:
        raise ConfigError(
            f"{key}: got carried; allowed: fresh, as a frozen trunk learns nothing and the heads of the phase before "
            f"({previous.adversary}, {previous.discriminator.heads}) do not fit ({phase.adversary}, {options.heads})"
        )
