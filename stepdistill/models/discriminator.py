"""The discriminator D: a trunk, which is the U-Net's encoder and mid-block, and heads that give one logit each.

trunk   lora    the shared base with an adapter for D (fits on one card)
        full    a copy of that part of the base, all of whose weights are trained (the paper's form)
        frozen  the shared base, unchanged
heads   mid     on the deepest features (the paper's form: the U-Net's mid-block)
        multi   on the features of every block
paired          D sees the features of x_s at s beside those of x_t at t (Eq 22)
single          D sees the features of x_s alone (Eq 23)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.config import Phase
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import DISCRIMINATOR, SharedNetwork

TRUNKS = ("lora", "full", "frozen")
HEADS = ("mid", "multi")
_HEADS, _ENCODER = "heads.", "encoder."
"""How the names of D's own parameters begin."""


class Head(nn.Module):
    """[conv 4x4 stride 2, GroupNorm, SiLU] until one position is left, then one logit: (B, C, H, W) -> (B, 1)."""

    def __init__(self, in_channels: int, width: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > 1:
            # 32 groups for the widths of SD and SDXL; at 1 x 1 a group of few channels would erase the signal
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if width % g == 0 and (width // g >= 16 or g == 1))
            layers += [
                nn.Conv2d(in_channels, width, 4, stride=2, padding=1),
                nn.GroupNorm(groups, width),
                nn.SiLU(),
            ]
            in_channels, size = width, size // 2
        self.body = nn.Sequential(*layers)
        self.logit = nn.Linear(in_channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 1) in float32; averages the positions that remain if the latents are not square.

        Heads compute in float32: a relativistic loss depends on the difference between the logits of two samples that are
        nearly the same, and bfloat16's 8 bits round it away in every layer. The heads cost about 1 % of the U-Net's work.
        """
        return self.logit(self.body(features.float()).mean(dim=(2, 3)))


@dataclass(frozen=True)
class DiscriminatorState:
    """A copy of a discriminator's weights on the CPU, by module name: trunk (empty if it is frozen) and heads."""

    trunk: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]


class Discriminator(nn.Module):
    """Heads on features of the base. All parameters that it trains are in the shared network's group "discriminator".

    Args:
        network: the shared base; a `lora` trunk adds D's adapter to it.
        trunk, heads, paired: see the top of this file.
        head_width: channels inside the heads; None: those of the features.
        rank: of the LoRA of a `lora` trunk.
        seed: of the initial weights of heads and LoRA.
        sample_size: the smaller of the latents' height and width.
        base: the base without adapters, which a `full` trunk copies; unused otherwise.
    """

    _network: SharedNetwork

    def __init__(
        self,
        network: SharedNetwork,
        *,
        trunk: str,
        heads: str,
        paired: bool,
        rank: int,
        seed: int,
        sample_size: int,
        head_width: int | None = None,
        base: Any = None,
    ) -> None:
        super().__init__()
        if trunk not in TRUNKS or heads not in HEADS:
            raise ValueError(
                f"discriminator: got trunk {trunk!r}, heads {heads!r}; allowed: {TRUNKS}, {HEADS}"
            )
        self.paired, self._heads_at, self._trunk = paired, heads, trunk
        object.__setattr__(
            self, "_network", network
        )  # the base is shared: not registered, so not among D's parameters
        places = network.kind.feature_shapes(network.model, sample_size)
        if heads == "mid":
            places = places[-1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reads = [(c * (2 if paired else 1), min(c, head_width or c), size) for c, size in places]
            self.heads = nn.ModuleList(Head(*shape) for shape in reads)
        self.encoder = self._encoder(base) if trunk == "full" else None
        adapter: dict[str, nn.Parameter] = {}
        if trunk == "lora":
            options = {"rank": rank, "seed": seed}
            adapter = network.add_adapter(DISCRIMINATOR, **options, trains=False, encoder_only=True)
        self.to(network.device)
        own = dict(self.named_parameters())
        network.set_group(
            DISCRIMINATOR, own | adapter, float32=[name for name in own if name.startswith(_HEADS)]
        )

    def _encoder(self, base: Any) -> Any:
        if base is None:
            raise ValueError("a full trunk copies the base network: pass `base`, loaded without adapters")
        encoder = self._network.kind.encoder_copy(base).float().requires_grad_(True)
        if self._network.model.is_gradient_checkpointing:
            encoder.enable_gradient_checkpointing(self._network.checkpointed)
        self._network.compile_blocks(encoder)
        return encoder

    @contextmanager
    def active(self, *, trains: bool) -> Iterator[None]:
        """Activates D's trunk inside the context. With trains=False gradients reach the sample but not D."""
        adapter = DISCRIMINATOR if self._trunk == "lora" else None
        with self._network.using(adapter, frozen=() if trains else (DISCRIMINATOR,)):
            yield

    def close(self) -> None:
        """Removes D's adapter and parameters from the shared network, at the end of a phase."""
        self._network.remove_group(DISCRIMINATOR)
        if self._trunk == "lora":
            self._network.remove_adapter(DISCRIMINATOR)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that D trains, by name: those of the heads, and of the trunk's adapter or copy."""
        return self._network.group(DISCRIMINATOR)

    def features(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """The features that the heads read, of sample (B, C, H, W) at timesteps (B,); call it inside `active`."""
        network = self._network.model if self.encoder is None else self.encoder
        sample = sample.to(self._network.dtype)
        features = self._network.kind.features(network, sample, timesteps, conditioning)
        return features if self._heads_at == "multi" else features[-1:]

    def logits(self, features: list[torch.Tensor], context: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits (B, heads) from the features of x_s, and from those of x_t (`context`) if D is paired."""
        if self.paired:
            assert context is not None, "a paired discriminator compares x_s with x_t"
            features = [torch.cat(pair, dim=1) for pair in zip(features, context, strict=True)]
        return torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], dim=1)

    def state(self) -> DiscriminatorState:
        """A copy of the weights of trunk and heads, for `load_state`."""
        trunk = {} if self._trunk == "frozen" else _copied(self._trunk_weights())
        return DiscriminatorState(trunk, _copied(self._own(_HEADS)))

    def load_state(self, state: DiscriminatorState, *, strict: bool = False) -> None:
        """Loads the trunk, which must be of the same kind, and the heads if all their shapes are equal.

        Heads of other shapes stay as they are, or raise ValueError if `strict`. ValueError for another trunk.
        """
        if self._trunk == "lora":
            self._network.load_adapter_state(DISCRIMINATOR, state.trunk)
        elif self._trunk == "full":
            if not _fits(state.trunk, self._own(_ENCODER)):
                raise ValueError("the state of another trunk does not fit this discriminator's full copy")
            self._load(_ENCODER, state.trunk)
        if _fits(state.heads, self._own(_HEADS)):
            self._load(_HEADS, state.heads)
        elif strict:
            raise ValueError("the state of other heads does not fit this discriminator")

    def _trunk_weights(self) -> dict[str, torch.Tensor]:
        return self._network.adapter_state(DISCRIMINATOR) if self._trunk == "lora" else self._own(_ENCODER)

    def _own(self, part: str) -> dict[str, torch.Tensor]:
        """The float32 weights of a part of D by their names in that part."""
        masters = self._network.weights(DISCRIMINATOR).masters()
        return {name.removeprefix(part): of for name, of in masters.items() if name.startswith(part)}

    def _load(self, part: str, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, master in self._own(part).items():
                master.copy_(state[name])
        self._network.weights(DISCRIMINATOR).refresh()


def build_discriminator(
    network: SharedNetwork,
    phase: Phase,
    *,
    base: Path,
    rank: int,
    seed: int,
    sample_size: int,
    carried: DiscriminatorState | None = None,
) -> Discriminator | None:
    """The discriminator that a phase needs; None if none of its objectives is adversarial.

    Args:
        network: the shared base.
        phase: gives the objectives and the discriminator's options.
        base: the pipeline's folder.
        rank: of the trunk's LoRA.
        seed: of the initial weights of heads and LoRA.
        sample_size: the smaller of the latents' height and width.
        carried: weights from the previous adversarial phase; loaded if the phase's discriminator.start is "carried".
    """
    if phase.adversary is None:
        return None
    options = phase.discriminator
    discriminator = Discriminator(
        network,
        trunk=options.trunk,
        heads=options.heads,
        head_width=options.head_width,
        paired=phase.adversary == "paired",
        rank=rank,
        seed=seed,
        sample_size=sample_size,
        base=load_network(base) if options.trunk == "full" else None,
    )
    if options.start == "carried":
        assert carried is not None, "the config refuses `carried` in the first adversarial phase of a rung"
        discriminator.load_state(carried)
    return discriminator


def _copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


def _fits(state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    """Whether a state has the names and shapes of these weights."""
    return {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in weights.items()}
