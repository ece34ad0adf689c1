"""The modules of a network by the places and names that a config's taps give, and where a discriminator's features lie."""

from collections.abc import Mapping

from torch import nn

FEATURE_DEPTHS = (1 / 4, 1 / 2, 2 / 3)
"""Where the discriminator's features of a transformer lie: after this share of the blocks."""


def blocks_on_the_way(count: int) -> list[int]:
    """The numbers of blocks, counted from 1, after which a transformer of so many has the discriminator's features."""
    return sorted({max(1, round(share * count)) for share in FEATURE_DEPTHS})


def thirds(blocks: list[str]) -> dict[str, list[str]]:
    """The blocks of a transformer at its three places; the middle has what does not divide by 3."""
    first, second = len(blocks) // 3, len(blocks) - len(blocks) // 3
    return {"encoder": blocks[:first], "middle": blocks[first:second], "decoder": blocks[second:]}


def modules_at(network: nn.Module, tap: str, places: Mapping[str, list[str]]) -> list[str]:
    """The modules at a place, or the module of this name; ValueError if there is none.

    places: the names of the modules at each place; empty for a place that this network lacks.
    """
    if places.get(tap):
        return places[tap]
    there = [place for place, names in places.items() if names]
    if tap in places:
        raise ValueError(f"got {tap!r}, but this network has no {tap}; allowed: {', '.join(there)}")
    try:
        network.get_submodule(tap)
    except AttributeError:
        raise ValueError(
            f"got {tap!r}, which names no module of the {type(network).__name__}; allowed: {', '.join(places)}, or a "
            f"module such as {places[there[-1]][0]}"
        ) from None
    return [tap]
