"""Checks, without weights, that the taps of feature objectives name modules of the network whose outputs are features."""

from collections.abc import Iterator

import torch

from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.ladder import PLACES
from stepdistill.config.objective_kinds import compares_features
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.teacher.facts import TeacherFacts


def check_taps(config: RunConfig, facts: TeacherFacts) -> None:
    """ConfigError if a tap names no module, one whose output is not (B, C, H, W) or (B, H W, C), or one in compiled code."""
    taps = dict(_taps_with_keys(config))
    if all(tap in ("encoder", "decoder") for tap in taps):
        return
    rehearsal = Rehearsal(config, facts, device="meta")
    network = rehearsal.network
    for tap, key in taps.items():
        try:
            network.modules_at([tap])
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
        if tap not in PLACES and config.training.compile and _is_compiled(network, tap):
            raise ConfigError(
                f"{key}: got {tap!r}, which training.compile compiles together with what is around it; allowed: "
                f"{', '.join(PLACES)}, or training.compile=false"
            )
    named = [tap for tap in taps if tap not in PLACES]
    shapes = _output_shapes(rehearsal, named)
    for tap in named:
        if len(shapes.get(tap, ())) not in (3, 4):
            raise ConfigError(
                f"{taps[tap]}: got {tap!r}, whose output is no map of features; allowed: {', '.join(PLACES)}, or a block or "
                f"layer that works on the image"
            )


def _taps_with_keys(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The taps of all objectives that compare features, each with its key."""
    lists = {
        f"ladder.{index}.phases.{number}": phase.weighted
        for index, rung in enumerate(config.ladder)
        for number, phase in enumerate(rung.phases)
    }
    if config.shrink is not None:
        lists["shrink"] = config.shrink.objectives
    for key, objectives in lists.items():
        for place, of in enumerate(objectives):
            if compares_features(of.kind):
                yield from ((tap, f"{key}.objectives.{place}.taps") for tap in of.taps)


def _is_compiled(network: SharedNetwork, tap: str) -> bool:
    parts = tap.split(".")
    modules = (network.model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts) + 1))
    return any(isinstance(module, network.kind.compiled_blocks) for module in modules)


def _output_shapes(rehearsal: Rehearsal, names: list[str]) -> dict[str, torch.Size]:
    """The shapes of these modules' outputs in a pass of the student; a module that does not run has none."""
    network = rehearsal.network
    with torch.device("meta"), torch.no_grad(), network.using(STUDENT), network.tapped(names) as outputs:
        batch = rehearsal.inputs.micro_batch()
        network.ask(batch.noise, batch.timesteps, batch.conditioning)
    return {name: output.shape for name, output in outputs.items() if isinstance(output, torch.Tensor)}
