"""Builds the smaller U-Net from the weights of the original, and measures how much each removed part matters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stepdistill.config import ConfigError
from stepdistill.teacher.unet_parts import can_follow, removable, smaller_config, source_name


@dataclass(frozen=True)
class Removal:
    """A part that could be removed, alone.

    parameters  how many it has
    error       of the output without it and without training: the root mean squared difference to the output of the whole
                U-Net, over the root mean square of that
    """

    part: str
    parameters: int
    error: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def smaller_network(model: Any, removed: Sequence[str]) -> Any:
    """The U-Net without these parts, with the same tensors as the original. ConfigError if they cannot be removed."""
    config = plain_config(model)
    with torch.device("meta"):
        smaller = type(model).from_config(smaller_config(config, removed))
    weights = model.state_dict()
    state = {name: weights[source_name(config, removed, name)] for name in smaller.state_dict()}
    smaller.load_state_dict(state, assign=True)
    return smaller.eval().requires_grad_(False)


def plain_config(model: Any) -> dict[str, Any]:
    """The config of a diffusers model, without the list of values that were not given: from_config would put the defaults
    in their place."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def parameters_of(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def removals(model: Any, outputs: "OutputError") -> Iterator[Removal]:
    """Each part that can be removed from a U-Net, with its parameters and the error of the output without it."""
    whole = parameters_of(model)
    for part in removable(plain_config(model)):
        smaller = smaller_network(model, [part])
        yield Removal(part, whole - parameters_of(smaller), outputs.of(smaller))


class OutputError:
    """Compares outputs with those of the whole U-Net on fixed inputs.

    ask: the output (B, C, H, W) of a network for each part of the inputs, in order.
    """

    def __init__(self, model: Any, ask: Callable[[Any], Iterable[torch.Tensor]]) -> None:
        self._ask = ask
        self._expected = list(ask(model))

    def of(self, model: Any) -> float:
        """The relative error of a network's outputs."""
        errors, sizes = 0.0, 0.0
        for output, expected in zip(self._ask(model), self._expected, strict=True):
            errors += float((output.double() - expected.double()).square().sum())
            sizes += float(expected.double().square().sum())
        return (errors / sizes) ** 0.5


def chosen(model: Any, table: Sequence[Removal], keep: float) -> list[str]:
    """The parts to remove so that at most `keep` of the parameters are left: those with the least error per parameter first.
    ConfigError if all parts together are not enough."""
    config, whole = plain_config(model), parameters_of(model)
    removed: list[str] = []
    for removal in sorted(table, key=lambda r: r.error / r.parameters):
        if _left(model, removed) <= keep * whole:
            break
        if can_follow(config, removed, removal.part):
            removed.append(removal.part)
    left = _left(model, removed)
    if left > keep * whole:
        raise ConfigError(
            f"shrink.keep: got {keep:g}, but without every part that can be removed {left / whole:.3f} of the parameters "
            f"are left; allowed: {left / whole:.3f} or more"
        )
    return removed


def _left(model: Any, removed: Sequence[str]) -> int:
    """Number of parameters without these parts."""
    with torch.device("meta"):
        return parameters_of(type(model).from_config(smaller_config(plain_config(model), removed)))


def sensitivity_table(table: Sequence[Removal], removed: Sequence[str]) -> str:
    """The parts in the order of their error per parameter, as Markdown."""
    lines = [
        "| part | parameters | error without it | error per million | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for removal in sorted(table, key=lambda r: r.error / r.parameters):
        each = removal.error / removal.parameters * 1e6
        is_removed = "removed" if removal.part in removed else ""
        lines.append(
            f"| {removal.part} | {removal.parameters:,} | {removal.error:.4f} | {each:.4f} | {is_removed} |"
        )
    return "\n".join(lines)
