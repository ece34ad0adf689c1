"""The discriminator: the base U-Net's encoder and mid-block, with a head that ends in one logit.

trunk   lora    the shared base with an adapter of D's own (fits one card)
        full    a copy of the base's encoder, trained whole (the paper's form)
        frozen  the shared base as it is
heads   mid     on the mid-block's features (the paper's form)
        multi   there and on the output of every down block
paired  the features of x_s at s beside those of x_t at t (Eq 22); single: of x_s alone (Eq 23)
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from stepdistill.config import ADVERSARIAL, Phase
from stepdistill.models.adapters import adapter_state, load_adapter_state
from stepdistill.models.conditioning import Conditioning
from stepdistill.models.loading import load_unet
from stepdistill.models.roles import DISCRIMINATOR, Roles

TRUNKS = ("lora", "full", "frozen")
HEADS = ("mid", "multi")


def encode(
    unet: UNet2DConditionModel, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> list[torch.Tensor]:
    """Features (B, C_i, H_i, W_i) after each down block and the mid-block: a U-Net without its decoder."""
    hidden_states = conditioning.encoder_hidden_states
    added = conditioning.added_cond_kwargs or None
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
    augmentation = unet.get_aug_embed(emb=emb, encoder_hidden_states=hidden_states, added_cond_kwargs=added)
    emb = emb if augmentation is None else emb + augmentation
    hidden_states = unet.process_encoder_hidden_states(
        encoder_hidden_states=hidden_states, added_cond_kwargs=added
    )
    state = unet.conv_in(sample)
    features = []
    for block in (*unet.down_blocks, unet.mid_block):
        if getattr(block, "has_cross_attention", False):
            result = block(state, temb=emb, encoder_hidden_states=hidden_states)
        else:
            result = block(state, temb=emb)
        state = result[0] if isinstance(result, tuple) else result
        features.append(state)
    return features


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
        """(B, C, H, W) -> (B, 1) in float32; what space an odd aspect ratio leaves is averaged.

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
    """Heads over the encoder of the base. `parameters()` are all that D trains; Roles freezes them for the student's step.

    Args:
        roles: the shared U-Net; gets D's adapter where the trunk is `lora`.
        base: the base U-Net without adapters, copied where the trunk is `full`; unused otherwise.
        sample_size: height or width of the latents, the smaller one.
    """

    _roles: Roles

    def __init__(
        self,
        roles: Roles,
        *,
        trunk: str,
        heads: str,
        paired: bool,
        rank: int,
        seed: int,
        sample_size: int,
        base: UNet2DConditionModel | None = None,
    ) -> None:
        super().__init__()
        if trunk not in TRUNKS or heads not in HEADS:
            raise ValueError(
                f"discriminator: got trunk {trunk!r}, heads {heads!r}; allowed: {TRUNKS}, {HEADS}"
            )
        self.paired, self._heads_at, self._trunk = paired, heads, trunk
        object.__setattr__(self, "_roles", roles)  # shared, so not among this module's own parameters
        channels = list(roles.unet.config.block_out_channels)
        sizes = [max(1, sample_size >> min(i + 1, len(channels) - 1)) for i in range(len(channels))]
        places = [*zip(channels, sizes, strict=True), (channels[-1], sizes[-1])]
        if heads == "mid":
            places = places[-1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(c * (2 if paired else 1), c, size) for c, size in places)
        roles.drop_discriminator()
        self.encoder: UNet2DConditionModel | None = None
        if trunk == "full":
            if base is None:
                raise ValueError("a full trunk copies the base U-Net: pass `base`, loaded without adapters")
            self.encoder = _without_decoder(base).float().requires_grad_(True)
            if roles.unet.is_gradient_checkpointing:
                self.encoder.enable_gradient_checkpointing(roles.checkpointed)
        adapter = roles.add_trunk_adapter(rank=rank, seed=seed) if trunk == "lora" else []
        self.to(next(roles.unet.parameters()).device)
        roles.discriminator_parameters = [*self.parameters(), *adapter]
        for parameter in roles.discriminator_parameters:
            parameter.requires_grad_(True)

    def features(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Encoder features of sample (B, C, H, W) at timesteps (B,), in float32, those that the heads read."""
        unet = self._roles.unet if self.encoder is None else self.encoder
        features = encode(unet, sample.to(unet.dtype), timesteps, conditioning)
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
            trunk = adapter_state(self._roles.unet, DISCRIMINATOR)
        elif self.encoder is not None:
            trunk = _copied(self.encoder)
        return DiscriminatorState(trunk, _copied(self.heads))

    def load_state(self, state: DiscriminatorState) -> None:
        """Takes over a trunk of the same kind, and the heads where every shape is the same; heads that do not fit stay as
        they are. ValueError for another trunk."""
        if self._trunk == "lora":
            load_adapter_state(self._roles.unet, DISCRIMINATOR, state.trunk)
        elif self.encoder is not None:
            if _shapes(self.encoder.state_dict()) != _shapes(state.trunk):
                raise ValueError("the state of another trunk does not fit this discriminator's full copy")
            self.encoder.load_state_dict(state.trunk)
        if _shapes(self.heads.state_dict()) == _shapes(state.heads):
            self.heads.load_state_dict(state.heads)


def build_discriminator(
    roles: Roles,
    phase: Phase,
    *,
    base: Path,
    rank: int,
    seed: int,
    sample_size: int,
    carried: DiscriminatorState | None = None,
) -> Discriminator | None:
    """The discriminator that a phase asks for; None for mse and convert.

    Args:
        roles: the shared U-Net.
        phase: its objective and discriminator options.
        base: the pipeline's folder.
        rank: of the trunk's LoRA.
        seed: of heads and LoRA that are new.
        sample_size: height or width of the latents, the smaller one.
        carried: what the adversarial phase before left; taken over where the phase's `start` is "carried".
    """
    if phase.objective not in ADVERSARIAL:
        return None
    options = phase.discriminator
    discriminator = Discriminator(
        roles,
        trunk=options.trunk,
        heads=options.heads,
        paired=phase.objective == "paired",
        rank=rank,
        seed=seed,
        sample_size=sample_size,
        base=load_unet(base) if options.trunk == "full" else None,
    )
    if options.start == "carried":
        assert carried is not None, "config.py refuses `carried` in the first adversarial phase of a rung"
        discriminator.load_state(carried)
    return discriminator


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _without_decoder(base: UNet2DConditionModel) -> UNet2DConditionModel:
    encoder = copy.deepcopy(base)
    encoder.up_blocks = nn.ModuleList()
    encoder.conv_norm_out, encoder.conv_out = None, nn.Identity()
    return encoder
