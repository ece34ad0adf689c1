"""The variants of eval/ablations.py: the default recipe with one thing changed.

A Change edits the config in place, as read from YAML (Raw); mostly it edits the ladder.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

from peers.methods import ADVERSARIAL, Method, kinds_of, ladder_method

from stepdistill.config import RunConfig
from stepdistill.config.load import parse_config
from stepdistill.config.saved import resolved

Raw = dict[str, Any]
Change = Callable[[Raw], None]


def phases(raw: Raw, kinds: tuple[str, ...] = ADVERSARIAL) -> list[dict[str, Any]]:
    """The phases of all rungs that have an objective among `kinds`."""
    return [phase for rung in raw["ladder"] for phase in rung["phases"] if kinds_of(phase) & set(kinds)]


def times(phase: dict[str, Any], factor: float) -> None:
    """Multiplies a phase's updates, of new and of kept targets alike, by `factor`."""
    for key in ("max_train_steps", "cached_updates"):
        phase[key] = phase[key] and max(1, round(factor * phase[key]))


def with_discriminator(**options: Any) -> Change:
    """Sets these options of every discriminator."""

    def change(raw: Raw) -> None:
        for phase in phases(raw):
            phase["discriminator"] |= options

    return change


def with_mse(**options: Any) -> Change:
    """Sets these options of every mse phase below the first rung."""

    def change(raw: Raw) -> None:
        for phase in phases({"ladder": raw["ladder"][1:]}, ("mse",)):
            phase |= options

    return change


def with_training(**options: Any) -> Change:
    """Sets these options of the training section."""
    return lambda raw: raw["training"].update(options)


def with_batch(size: int) -> Change:
    """Batches of `size` samples: as many more updates of mse. The adversarial phases keep their number of updates, because
    each moves the student as far whatever the batch; scaling to equal passes then gives what they save to all phases."""

    def change(raw: Raw) -> None:
        factor = size / raw["training"]["train_batch_size"]
        raw["training"]["train_batch_size"] = size
        for phase in phases(raw, ("mse",)):
            times(phase, 1 / factor)

    return change


def with_last_rung(**options: Any) -> Change:
    """Sets these options of the 1-step rung."""
    return lambda raw: raw["ladder"][-1].update(options)


def with_first_rung(**options: Any) -> Change:
    """Sets these options of the first rung."""
    return lambda raw: raw["ladder"][0].update(options)


def adversary_times(factor: float) -> Change:
    """Multiplies the adversarial updates by `factor`; 0 removes the adversarial phases."""

    def change(raw: Raw) -> None:
        for rung in raw["ladder"]:
            rung["phases"] = [
                phase for phase in rung["phases"] if factor or not kinds_of(phase) & set(ADVERSARIAL)
            ]
        for phase in phases(raw):
            times(phase, factor)

    return change


def gentle_adversary(factor: float) -> Change:
    """`factor` times as many adversarial updates, with as much smaller rates of the student: it moves as far, and the noise
    of the updates averages out."""

    def change(raw: Raw) -> None:
        adversary_times(factor)(raw)
        for phase in phases(raw):
            phase["learning_rate"] /= factor

    return change


def in_turn(*changes: Change) -> Change:
    """Several changes, one after the other."""

    def change(raw: Raw) -> None:
        for one in changes:
            one(raw)

    return change


def paired_alone(raw: Raw) -> None:
    """All adversarial phases are paired: the discriminator sees x_t beside each sample."""
    for phase in phases(raw):
        phase["objective"] = "paired"


def paired_then_single(raw: Raw) -> None:
    """The paper's order: half of the adversarial updates paired (the discriminator sees x_t), then half single."""
    for rung in raw["ladder"]:
        rung["phases"] = [half for phase in rung["phases"] for half in _halves(phase)]


def _halves(phase: dict[str, Any]) -> list[dict[str, Any]]:
    if not kinds_of(phase) & set(ADVERSARIAL):
        return [phase]
    updates = max(1, phase["max_train_steps"] // 2)
    return [copy.deepcopy(phase) | {"objective": kind, "max_train_steps": updates} for kind in ADVERSARIAL]


def skip_level(raw: Raw) -> None:
    """For every rung below the second, the teacher of the mse phases is the student of the rung two before."""
    for before, rung in zip(raw["ladder"], raw["ladder"][2:], strict=False):
        for phase in rung["phases"]:
            if "mse" in kinds_of(phase):
                phase["teacher_steps"] = before["student_steps"]


def x0_at_one_step(raw: Raw) -> None:
    """The last rung predicts x0 at the last timestep; a convert phase comes first."""
    last = raw["ladder"][-1]
    convert = copy.deepcopy(last["phases"][0]) | {
        "objective": "convert",
        "cached_updates": None,
        "learning_rate": 1e-3,
    }
    convert["max_train_steps"] = max(1, last["phases"][0]["max_train_steps"] // 3)
    last |= {"prediction_type": "sample", "start_timestep": None, "phases": [convert, *last["phases"]]}


def targets_once(raw: Raw) -> None:
    """Every mse update has new targets."""
    for phase in phases(raw, ("mse",)):
        phase["cached_updates"] = None


def targets_times(uses: int) -> Change:
    """Every mse target is used `uses` times."""

    def change(raw: Raw) -> None:
        for phase in phases(raw, ("mse",)):
            phase["cached_updates"] = max(1, phase["max_train_steps"] // uses)

    return change


def even_updates(raw: Raw) -> None:
    """The same number of mse updates on every rung below the first."""
    mse_phases = phases({"ladder": raw["ladder"][1:]}, ("mse",))
    mean = round(sum(phase["max_train_steps"] for phase in mse_phases) / len(mse_phases))
    for phase in mse_phases:
        times(phase, mean / phase["max_train_steps"])


def without_rung(steps: int) -> Change:
    """Removes the rung with `steps` student steps; the rung below it learns from the rung above it."""

    def change(raw: Raw) -> None:
        rungs = [rung for rung in raw["ladder"] if rung["student_steps"] != steps]
        for before, rung in itertools.pairwise(rungs):
            rung["teacher_steps"] = before["student_steps"]
        raw["ladder"] = rungs

    return change


def straight_to(steps: int) -> Change:
    """Only two rungs: guidance, then one jump to `steps` steps."""

    def change(raw: Raw) -> None:
        first, last = raw["ladder"][0], raw["ladder"][-1]
        target = next(rung for rung in raw["ladder"] if rung["student_steps"] == steps)
        raw["ladder"] = [first, (last if steps == 1 else target) | {"teacher_steps": first["student_steps"]}]

    return change


def with_16(raw: Raw) -> None:
    """Replaces 32 -> 8 by 32 -> 16 -> 8, with half of the updates on each."""
    rung = next(rung for rung in raw["ladder"] if rung["student_steps"] == 8)
    for phase in rung["phases"]:
        times(phase, 0.5)
    place = raw["ladder"].index(rung)
    raw["ladder"].insert(place, copy.deepcopy(rung) | {"student_steps": 16})
    rung["teacher_steps"] = 16


def with_features(raw: Raw) -> None:
    """The mse phases below the first rung compare features too, as in configs/letters_features.yaml."""
    features = [
        {"kind": "mse"},
        {"kind": "l2", "taps": ["middle", "decoder"], "weight": 0.1},
        {"kind": "relations", "taps": ["middle"], "weight": 0.05, "final_weight": 0.0},
    ]
    for phase in phases({"ladder": raw["ladder"][1:]}, ("mse",)):
        phase |= {"objective": None, "objectives": copy.deepcopy(features), "balance": "gradient"}
        phase["cached_updates"] = None


def guidance_times(factor: float) -> Change:
    """Multiplies the updates of the first rung, which learns guidance, by `factor`."""

    def change(raw: Raw) -> None:
        for phase in raw["ladder"][0]["phases"]:
            times(phase, factor)

    return change


def with_guidance(**options: Any) -> Change:
    """Sets these options of the first rung's phases, which learn guidance."""

    def change(raw: Raw) -> None:
        for phase in raw["ladder"][0]["phases"]:
            phase |= options

    return change


def guidance_rate_times(factor: float) -> Change:
    """Multiplies the learning rate of the first rung, which learns guidance, by `factor`."""

    def change(raw: Raw) -> None:
        for phase in raw["ladder"][0]["phases"]:
            phase["learning_rate"] *= factor

    return change


def without_guidance_rung(raw: Raw) -> None:
    """No rung learns guidance alone: the first one goes from the guided teacher's steps to 8."""
    del raw["ladder"][0]


def rates_times(factor: float) -> Change:
    """Multiplies the learning rates of all mse phases by `factor`."""

    def change(raw: Raw) -> None:
        for phase in phases(raw, ("mse",)):
            phase["learning_rate"] *= factor

    return change


def mse_beside_the_adversary(raw: Raw) -> None:
    """The adversarial phases minimise mse too; both have equal shares of the gradient."""
    for phase in phases(raw):
        kinds = [{"kind": "single"}, {"kind": "mse"}]
        phase |= {"objective": None, "objectives": kinds, "balance": "gradient"}


def one_phase(raw: Raw) -> None:
    """Each rung has one phase of mse and the adversary, whose share of the gradient falls from a fifth to nothing."""
    for rung in raw["ladder"]:
        adversarial = [phase for phase in rung["phases"] if kinds_of(phase) & set(ADVERSARIAL)]
        if adversarial:
            first = rung["phases"][0]
            kinds = [{"kind": "mse"}, {"kind": "single", "weight": 0.25, "final_weight": 0.0}]
            first |= {"objective": None, "objectives": kinds, "balance": "gradient", "cached_updates": None}
            rung["phases"] = [first | {"discriminator": adversarial[0]["discriminator"]}]


def with_dmd(*, adversary: float) -> Change:
    """The adversarial phases match distributions from the student's own inputs, as in configs/letters_dmd2.yaml, with this
    weight of the adversary beside it."""

    def change(raw: Raw) -> None:
        for phase in phases(raw):
            beside = [{"kind": "single", "weight": adversary}] if adversary else []
            phase |= {
                "objective": None,
                "objectives": [{"kind": "dmd"}, *beside],
                "inputs": "own",
                "critic_updates": 5,
                "max_train_steps": 40,
                "learning_rate": 1e-4,
                "fake_score_learning_rate": 5e-4,
            }

    return change


VARIANTS: dict[str, Change] = {
    "default": lambda raw: None,
    "mse-alone": adversary_times(0),
    "half-the-adversary": adversary_times(0.5),
    "twice-the-adversary": adversary_times(2),
    "gentle-adversary": gentle_adversary(3),
    "few-adversarial-updates": gentle_adversary(0.4),
    "paired-then-single": paired_then_single,
    "paired-alone": paired_alone,
    "teacher-as-real": with_discriminator(real="teacher"),
    "head-on-the-middle": with_discriminator(heads="mid"),
    "non-saturating": with_discriminator(loss="non_saturating"),
    "trunk-frozen": with_discriminator(trunk="frozen"),
    "trunk-full": with_discriminator(trunk="full"),
    "perturbation-5-1-1-1": with_discriminator(perturbation_weights=[5.0, 1.0, 1.0, 1.0]),
    "loss-in-epsilon": with_mse(loss_space="epsilon"),
    "loss-in-v": with_mse(loss_space="v_prediction"),
    "ema-.95": with_training(ema_decay=0.95),
    "bfloat16": with_training(mixed_precision="bf16"),
    "features": with_features,
    "mse-beside-the-adversary": mse_beside_the_adversary,
    "one-phase": one_phase,
    "dmd": with_dmd(adversary=0.01),
    "dmd-alone": with_dmd(adversary=0.0),
    "guidance-twice": guidance_times(2),
    "guidance-half": guidance_times(0.5),
    "guidance-in-v": with_guidance(loss_space="v_prediction"),
    "without-guidance-rung": without_guidance_rung,
    "rates-half": rates_times(0.5),
    "rates-twice": rates_times(2),
    "decay-to-nothing": with_training(lr_final_fraction=0.0),
    "batch-16": with_batch(16),
    "batch-8": with_batch(8),
    "batch-16-slow-guidance": in_turn(with_batch(16), guidance_rate_times(0.5)),
    "skip-level": skip_level,
    "targets-once": targets_once,
    "targets-thrice": targets_times(3),
    "even-updates": even_updates,
    "with-16": with_16,
    "start-at-999": with_last_rung(start_timestep=None),
    "start-at-749": with_last_rung(start_timestep=749),
    "start-at-249": with_last_rung(start_timestep=249),
    "x0-at-one-step": x0_at_one_step,
    "from-128": with_first_rung(teacher_steps=128),
    "without-8": without_rung(8),
    "without-4": without_rung(4),
    "without-2": without_rung(2),
    "straight-to-4": straight_to(4),
    "straight-to-1": straight_to(1),
}


def varied(name: str, config: RunConfig) -> RunConfig:
    """The config with the change `VARIANTS[name]`."""
    raw = resolved(config)
    VARIANTS[name](raw)
    return parse_config(raw)


def variant(name: str) -> Method:
    """The method that trains the default recipe with the change `VARIANTS[name]`."""
    return ladder_method(name, functools.partial(varied, name))
