"""The parts that can be removed from a diffusers U-Net, the config of the rest, and where its weights are from. No torch.

level.L.pair.K           residual block K with its attention, of down block L and of the up block at the same level; the
                         encoder's first block changes the width, and so do the decoder's first and last, so these stay
level.L.encoder.layer.K  transformer block K of the encoder's attentions at level L, of which one stays; at the last level,
                         of the mid-block's too
level.L.decoder.layer.K  transformer block K of the decoder's attentions at level L
level.L.layer.K          both
middle.end               attention and second residual block of the mid-block
middle                   the whole mid-block

What is left is a U-Net that diffusers builds from its config: shorter `layers_per_block`, `transformer_layers_per_block`
and `reverse_transformer_layers_per_block` (the decoder's; SSD-1B has it), another `mid_block_type`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.config import ConfigError

MIDDLE, MIDDLE_END = "middle", "middle.end"
_CROSS_ATTENTION_MIDDLE, _RESIDUAL_MIDDLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
_MODULE = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)")
_LAYER = re.compile(r"(.*transformer_blocks)\.(\d+)\.(.*)")


@dataclass(frozen=True)
class _Layout:
    """Numbers of residual blocks in the encoder and of transformer blocks by level, and the kind of mid-block."""

    pairs: tuple[int, ...]
    layers: tuple[int, ...]
    middle: str | None

    @classmethod
    def of(cls, unet: Mapping[str, Any]) -> "_Layout":
        """The layout of a U-Net's config."""
        levels = len(unet["block_out_channels"])
        pairs = _per_level(unet.get("layers_per_block", 2), levels)
        layers = _per_level(unet.get("transformer_layers_per_block", 1), levels)
        return cls(pairs, layers, unet.get("mid_block_type", _CROSS_ATTENTION_MIDDLE))


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def removable(unet: Mapping[str, Any]) -> list[str]:
    """The names of all parts that can be removed from the U-Net of this config, each alone."""
    layout, names = _Layout.of(unet), list[str]()
    for level, count in enumerate(layout.pairs):
        names += [f"level.{level}.pair.{index}" for index in range(1, count)]
    for level in _levels_with_layers(unet):
        numbers = range(layout.layers[level])
        names += [f"level.{level}.encoder.layer.{index}" for index in numbers if len(numbers) > 1]
        names += [f"level.{level}.decoder.layer.{index}" for index in numbers]
    if layout.middle == _CROSS_ATTENTION_MIDDLE:
        names.append(MIDDLE_END)
    if layout.middle is not None:
        names.append(MIDDLE)
    return names


def _levels_with_layers(unet: Mapping[str, Any]) -> Iterable[int]:
    """The levels whose number of transformer blocks can be changed: those that have attention, if the decoder's numbers are
    the encoder's and all attentions of a level have the same."""
    counts = unet.get("transformer_layers_per_block", 1)
    is_plain = isinstance(counts, int) or all(isinstance(count, int) for count in counts)
    if unet.get("reverse_transformer_layers_per_block") is not None or not is_plain:
        return []
    return [level for level, kind in enumerate(unet["down_block_types"]) if "Attn" in kind]


def check_removed(unet: Mapping[str, Any], removed: Sequence[str]) -> None:
    """ConfigError unless these parts can be removed together from the U-Net of this config."""
    allowed = removable(unet)
    both = [name.replace(".encoder.", ".") for name in allowed if ".encoder." in name]
    for name in removed:
        if name not in [*allowed, *both]:
            raise ConfigError(
                f"shrink.remove: got {name!r}, which is no part of this U-Net or must stay in it; allowed: "
                f"{', '.join([*allowed, *both]) or 'nothing'}"
            )
    layout = _Layout.of(unet)
    for level, count in enumerate(layout.layers):
        if not _layers_left(layout, removed, level, "encoder"):
            raise ConfigError(
                f"shrink.remove: got all {count} layers of level {level}'s encoder; allowed: at most {count - 1} of them"
            )


def can_follow(unet: Mapping[str, Any], removed: Sequence[str], name: str) -> bool:
    """Whether one more part can be removed."""
    try:
        check_removed(unet, [*removed, name])
    except ConfigError:
        return False
    return name not in removed and not (name == MIDDLE_END and MIDDLE in removed)


def smaller_config(unet: Mapping[str, Any], removed: Sequence[str]) -> dict[str, Any]:
    """The config of the U-Net without these parts. ConfigError if they cannot be removed."""
    check_removed(unet, removed)
    layout, config = _Layout.of(unet), dict(unet)
    levels = range(len(layout.pairs))
    pairs = [layout.pairs[level] - len(_of_level(removed, level, "pair")) for level in levels]
    encoder, decoder = (
        [len(_layers_left(layout, removed, k, s)) for k in levels] for s in ("encoder", "decoder")
    )
    config |= {"layers_per_block": _short(pairs), "transformer_layers_per_block": _short(encoder)}
    if decoder != encoder:
        config["reverse_transformer_layers_per_block"] = decoder[::-1]
    if MIDDLE in removed:
        config["mid_block_type"] = None
    elif MIDDLE_END in removed:
        config["mid_block_type"] = _RESIDUAL_MIDDLE
    return config


def _short(counts: list[int]) -> int | list[int]:
    """One number if all are equal: diffusers 0.42's `set_adapters` with weights takes no list."""
    return counts[0] if len(set(counts)) == 1 else counts


def _layers_left(layout: _Layout, removed: Iterable[str], level: int, side: str) -> list[int]:
    """The numbers of the transformer blocks that are left in each attention of a level's encoder or decoder."""
    gone = _of_level(removed, level, "layer") | _of_level(removed, level, f"{side}.layer")
    return _kept(layout.layers[level], gone)


def _of_level(removed: Iterable[str], level: int, kind: str) -> set[int]:
    """The numbers of the removed pairs or layers of a level."""
    prefix = f"level.{level}.{kind}."
    return {int(name.removeprefix(prefix)) for name in removed if name.startswith(prefix)}


def source_name(unet: Mapping[str, Any], removed: Sequence[str], name: str) -> str:
    """The name in the original U-Net of the weight that is called `name` in the smaller one."""
    layout = _Layout.of(unet)
    levels = len(layout.pairs)
    level, is_down, match = levels - 1, True, _MODULE.fullmatch(name)
    if match is not None:
        blocks, block, kind, index, rest = match.groups()
        is_down = blocks == "down_blocks"
        level = int(block) if is_down else levels - 1 - int(block)
        count = layout.pairs[level] if is_down else layout.pairs[level] + 1
        kept = _kept(count, _of_level(removed, level, "pair"))
        name = f"{blocks}.{block}.{kind}.{kept[int(index)]}.{rest}"
    inner = _LAYER.fullmatch(name)
    if inner is not None:
        before, index, rest = inner.groups()
        kept = _layers_left(layout, removed, level, "encoder" if is_down else "decoder")
        name = f"{before}.{kept[int(index)]}.{rest}"
    return name


def _kept(count: int, removed: set[int]) -> list[int]:
    """The numbers that are left."""
    return [index for index in range(count) if index not in removed]
