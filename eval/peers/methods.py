"""The compared methods: each trains its LoRAs within a budget of U-Net forwards, and defines how they are sampled."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from side_by_side import STEPS

from stepdistill import plan, stages
from stepdistill.config import LoraRow, RunConfig
from stepdistill.config.load import parse_config
from stepdistill.config.objective_kinds import OBJECTIVES, is_adversarial
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import read_json
from stepdistill.run.rungs import WEIGHT_NAME, read_rung, rung_folder
from stepdistill.teacher.source import teacher_facts

from . import dmd2, lcm
from .train import train_dmd2, train_lcm

HERE = Path(__file__).parent
LIGHTNING = HERE.parents[1] / "configs" / "letters_lightning.yaml"
ADVERSARIAL = tuple(filter(is_adversarial, OBJECTIVES))


def kinds_of(phase: Mapping[str, Any]) -> set[str]:
    """The names of a phase's objectives, in either form."""
    return {objective["kind"] for objective in phase["objectives"]} or {phase["objective"]}


LIGHTNING_NOTE = (
    "Lightning has no row at 1 step: what it takes to convert its 2-step student to x0 output is not in this budget "
    "(eval/conversion.py). The rungs above have the forwards that this rung would have."
)
LCM_LEARNING_RATE = 1e-3
DMD2_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    config  makes the method's config from the shared one
    train   trains the LoRAs in the method's run folder
    rows    how the LoRAs are sampled, one row per step count
    cost    U-Net forwards and seconds of the training
    note    a remark that is printed below the table
    `config` and `train` also take the budget in U-Net forwards and the factor on learning rates.
    """

    name: str
    config: Callable[[RunConfig, float, float], RunConfig]
    train: Callable[[RunConfig, float, float], None]
    rows: Callable[[RunConfig], list[LoraRow]]
    cost: Callable[[RunConfig], dict[str, float]]
    note: str = ""


def scaled(config: RunConfig, *, budget: float, keep: int = 0, factor: float = 1.0) -> RunConfig:
    """The config scaled to a budget: training takes `budget` U-Net forwards in all.

    The updates of the first `keep` rungs stay; those of the others are scaled. Learning rates are multiplied by `factor`.
    """
    scaled_steps = [rung.student_steps for rung in config.ladder[keep:]]
    fixed = plan.training_forwards(config, finished=scaled_steps) if keep else 0.0
    share = (budget - fixed) / (plan.training_forwards(config) - fixed)
    raw = resolved(config)
    for rung in raw["ladder"][keep:]:
        for phase in rung["phases"]:
            for key in ("max_train_steps", "cached_updates"):
                phase[key] = phase[key] and max(1, round(phase[key] * share))
    for phase in (phase for rung in raw["ladder"] for phase in rung["phases"]):
        phase["learning_rate"] *= factor
        rate = phase["discriminator"]["learning_rate"]
        phase["discriminator"]["learning_rate"] = None if rate is None else rate * factor
    return parse_config(raw)


def named(config: RunConfig, name: str) -> RunConfig:
    """The config as the run of a method, one per seed."""
    return config.model_copy(update={"name": f"{name}-s{config.seed}"})


def _peer(config: RunConfig, name: str) -> RunConfig:
    """The config of a method without a ladder."""
    return named(config.model_copy(update={"ladder": ()}), name)


def ladder_method(name: str, change: Callable[[RunConfig], RunConfig], *, note: str = "") -> Method:
    """A method that is a ladder of this package: the config's ladder after `change`, scaled to the budget.

    Leading rungs that `change` leaves as they are keep their updates, so that they can be shared.
    """

    def configure(config: RunConfig, budget: float, factor: float) -> RunConfig:
        base = scaled(config, budget=budget)
        changed = change(base)
        pairs = zip(changed.ladder, base.ladder, strict=False)
        keep = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if keep == len(changed.ladder):
            return named(scaled(changed, budget=plan.training_forwards(base), factor=factor), name)
        return named(scaled(changed, budget=budget, keep=keep, factor=factor), name)

    def train(config: RunConfig, _budget: float, _factor: float) -> None:
        stages.prepare(config)
        stages.distill(config)
        stages.export(config)

    def rows(config: RunConfig) -> list[LoraRow]:
        steps = [rung.student_steps for rung in config.ladder if rung.student_steps in STEPS]
        return [LoraRow(name=f"{name}-{n}", path=str(rung_folder(config.run_dir, n)), steps=n) for n in steps]

    def cost(config: RunConfig) -> dict[str, float]:
        records = [read_rung(config.run_dir, rung.student_steps) for rung in config.ladder]
        seconds = sum(r.training_seconds or 0 for r in records if r is not None)
        return {"unet_forwards": round(plan.training_forwards(config)), "training_seconds": round(seconds, 1)}

    return Method(name, configure, train, rows, cost, note)


def lcm_method() -> Method:
    """LCM-LoRA: one LoRA for all step counts."""

    def train(config: RunConfig, budget: float, factor: float) -> None:
        stages.prepare(config)
        updates = round(budget / lcm.FORWARDS / config.training.train_batch_size)
        train_lcm(config, config.run_dir / "lcm", updates=updates, learning_rate=LCM_LEARNING_RATE * factor)

    def rows(config: RunConfig) -> list[LoraRow]:
        folder, is_flow = str(config.run_dir / "lcm"), teacher_facts(config).matches_flows
        kind = "FlowMatchLCMScheduler" if is_flow else "LCMScheduler"
        return [
            LoraRow(name=f"lcm-lora-{n}", path=folder, steps=n, scheduler=kind, scheduler_options={})
            for n in STEPS
        ]

    return Method("lcm-lora", lambda c, *_: _peer(c, "lcm-lora"), train, rows, _cost_of(["lcm"]))


def dmd2_method() -> Method:
    """DMD2-LoRA: a LoRA per step count, each with an equal share of the budget and started from the one before."""

    def train(config: RunConfig, budget: float, factor: float) -> None:
        stages.prepare(config)
        start: Path | None = None
        for n in STEPS:
            updates = max(1, round(budget / len(STEPS) / dmd2.forwards(n) / config.training.train_batch_size))
            folder = config.run_dir / f"dmd2-{n}"
            train_dmd2(
                config,
                folder,
                steps=n,
                updates=updates,
                learning_rate=DMD2_LEARNING_RATE * factor,
                start=start,
            )
            start = folder / WEIGHT_NAME

    def rows(config: RunConfig) -> list[LoraRow]:
        return [
            LoraRow(
                name=f"dmd2-lora-{n}",
                path=str(config.run_dir / f"dmd2-{n}"),
                steps=n,
                scheduler="LCMScheduler",
                scheduler_options={},
                timesteps=tuple(dmd2.nodes(n).tolist()),
            )
            for n in STEPS
        ]

    folders = [f"dmd2-{n}" for n in STEPS]
    return Method("dmd2-lora", lambda c, *_: _peer(c, "dmd2-lora"), train, rows, _cost_of(folders))


def ladder_of(path: Path) -> Callable[[RunConfig], RunConfig]:
    """A change that replaces a config's ladder by that of a YAML file."""

    def change(config: RunConfig) -> RunConfig:
        return parse_config(resolved(config) | {"ladder": yaml.safe_load(path.read_text())["ladder"]})

    return change


def lightning(config: RunConfig) -> RunConfig:
    """SDXL-Lightning's ladder as printed, down to 2 steps; see LIGHTNING_NOTE."""
    printed = ladder_of(LIGHTNING)(config)
    return printed.model_copy(update={"ladder": tuple(r for r in printed.ladder if r.student_steps > 1)})


def without_adversary(config: RunConfig) -> RunConfig:
    """The config with only the mse and convert phases of its ladder. A rung that has none keeps its phases."""
    raw = resolved(config)
    for rung in raw["ladder"]:
        non_adversarial = [phase for phase in rung["phases"] if not kinds_of(phase) & set(ADVERSARIAL)]
        rung["phases"] = non_adversarial or rung["phases"]
    return parse_config(raw)


def methods() -> dict[str, Method]:
    """All methods by name, stepdistill's first."""
    all_methods = (
        ladder_method("stepdistill", lambda config: config),
        ladder_method("stepdistill-mse", without_adversary),
        ladder_method("progressive", ladder_of(HERE / "progressive.yaml")),
        lcm_method(),
        dmd2_method(),
        ladder_method("lightning", lightning, note=LIGHTNING_NOTE),
    )
    return {method.name: method for method in all_methods}


def _cost_of(folders: list[str]) -> Callable[[RunConfig], dict[str, float]]:
    def cost(config: RunConfig) -> dict[str, float]:
        records = [read_json(config.run_dir / folder / "peer.json") or {} for folder in folders]
        return {key: sum(r.get(key, 0) for r in records) for key in ("unet_forwards", "training_seconds")}

    return cost
