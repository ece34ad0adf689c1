"""The discriminator: the part of the base network that gives features, with heads that each end in one logit.

trunk   lora    the shared base with an adapter of D's own (fits one card)
        full    a copy of that part of the base, trained whole (the paper's form)
        frozen  the shared base as it is
heads   mid     on the deepest features (the paper's form: the U-Net's mid-block)
        multi   on the features of every block
paired  the features of x_s at s beside those of x_t at t (Eq 22); single: of x_s alone (Eq 23)
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.config import Phase
from stepdistill.models.adapters import adapter_state, load_adapter_state
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import DISCRIMINATOR, SharedNetwork

TRUNKS = ("lora", "full", "frozen")
HEADS = ("mid", "multi")


class Head(nn.Module):
    """[conv 4x4 stride 2, GroupNorm, SiLU] until the space is gone, then one logit: (B, C, H, W) -> (B, 1)."""

    def __init__(self, in_channels: int, width: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > 1:
            # 32 groups for the widths of SD and SDXL; at 1 x 1 a group of few channels normalises the signal away
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
        """(B, C, H, W) -> (B, 1) in float32; positions that are left of an odd aspect ratio are averaged.

        Outside autocast: a relativistic loss is about the difference between the logits of two samples that are nearly the
        same, and bfloat16's 8 bits round that away in every layer. It is about 1 % of the U-Net's work.
        """
        device = features.device.type
        has_autocast = torch.amp.is_autocast_available(device)  # not on the meta device
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            return self.logit(self.body(features.float()).mean(dim=(2, 3)))


@dataclass(frozen=True)
class DiscriminatorState:
    """A copy of what a discriminator has learned, on the CPU: the weights of its trunk (empty where that is frozen) and of
    its heads, each under module names."""

    trunk: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]


class Discriminator(nn.Module):
    """Heads over features of the base. All that it trains is the group "discriminator" of the shared network.

    Args:
        network: the shared base; gets D's adapter where the trunk is `lora`.
        base: the base without adapters, copied where the trunk is `full`; unused otherwise.
        sample_size: height or width of the latents, the smaller one.
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
        base: Any = None,
    ) -> None:
        super().__init__()
        if trunk not in TRUNKS or heads not in HEADS:
            raise ValueError(
                f"discriminator: got trunk {trunk!r}, heads {heads!r}; allowed: {TRUNKS}, {HEADS}"
            )
        self.paired, self._heads_at, self._trunk = paired, heads, trunk
        object.__setattr__(self, "_network", network)  # shared, so not among this module's own parameters
        places = network.kind.feature_shapes(network.model, sample_size)
        if heads == "mid":
            places = places[-1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(c * (2 if paired else 1), c, size) for c, size in places)
        self.encoder = self._encoder(base) if trunk == "full" else None
        adapter: dict[str, nn.Parameter] = {}
        if trunk == "lora":
            adapter = network.add_adapter(DISCRIMINATOR, rank=rank, seed=seed, encoder_only=True)
        self.to(next(network.model.parameters()).device)
        network.set_group(DISCRIMINATOR, dict(self.named_parameters()) | adapter)

    def _encoder(self, base: Any) -> Any:
        if base is None:
            raise ValueError("a full trunk copies the base network: pass `base`, loaded without adapters")
        encoder = self._network.kind.encoder_copy(base).float().requires_grad_(True)
        if self._network.model.is_gradient_checkpointing:
            encoder.enable_gradient_checkpointing(self._network.checkpointed)
        return encoder

    @contextmanager
    def active(self, *, trains: bool) -> Iterator[None]:
        """D's trunk is in force inside. With trains=False gradients reach the sample and not D."""
        adapter = DISCRIMINATOR if self._trunk == "lora" else None
        with self._network.using(adapter, frozen=() if trains else (DISCRIMINATOR,)):
            yield

    def close(self) -> None:
        """Takes D's adapter and parameters off the shared network, as at the end of a phase."""
        self._network.set_group(DISCRIMINATOR, {})
        if self._trunk == "lora":
            self._network.remove_adapter(DISCRIMINATOR)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that D trains by name: heads, and the trunk's adapter or copy."""
        return self._network.group(DISCRIMINATOR)

    def features(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Features of sample (B, C, H, W) at timesteps (B,) that the heads read, in float32; inside `active`."""
        network = self._network.model if self.encoder is None else self.encoder
        features = self._network.kind.features(network, sample, timesteps, conditioning)
        return [f.float() for f in (features if self._heads_at == "multi" else features[-1:])]

    def logits(self, features: list[torch.Tensor], context: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits (B, heads) of the features of x_s, beside those of x_t (`context`) where D is paired."""
        if self.paired:
            assert context is not None, "a paired discriminator compares x_s with x_t"
            features = [torch.cat(pair, dim=1) for pair in zip(features, context, strict=True)]
        return torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], dim=1)

    def state(self) -> DiscriminatorState:
        """What it has learned, for the discriminator of a later phase."""
        trunk: dict[str, torch.Tensor] = {}
        if self._trunk == "lora":
            trunk = adapter_state(self._network.model, DISCRIMINATOR)
        elif self.encoder is not None:
            trunk = _copied(self.encoder)
        return DiscriminatorState(trunk, _copied(self.heads))

    def load_state(self, state: DiscriminatorState, *, strict: bool = False) -> None:
        """Takes over a trunk of the same kind, and the heads where every shape is the same; others stay as they are, unless
        `strict`. ValueError for another trunk and, where `strict`, for other heads."""
        if self._trunk == "lora":
            load_adapter_state(self._network.model, DISCRIMINATOR, state.trunk)
        elif self.encoder is not None:
            if _shapes(self.encoder.state_dict()) != _shapes(state.trunk):
                raise ValueError("the state of another trunk does not fit this discriminator's full copy")
            self.encoder.load_state_dict(state.trunk)
        if _shapes(self.heads.state_dict()) == _shapes(state.heads):
            self.heads.load_state_dict(state.heads)
        elif strict:
            raise ValueError("the state of other heads does not fit this discriminator")


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
    """The discriminator that a phase asks for; None where no objective has one.

    Args:
        network: the shared base.
        phase: its objectives and discriminator options.
        base: the pipeline's folder.
        rank: of the trunk's LoRA.
        seed: of heads and LoRA that are new.
        sample_size: height or width of the latents, the smaller one.
        carried: what the adversarial phase before left; taken over where the phase's `start` is "carried".
    """
    if phase.adversary is None:
        return None
    options = phase.discriminator
    discriminator = Discriminator(
        network,
        trunk=options.trunk,
        heads=options.heads,
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


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
