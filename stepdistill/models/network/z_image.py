"""The transformer of Z-Image, in which tokens of image and text are one sequence (2511.22699, section 3).

Texts are of different lengths. The network's own forward pass takes lists, one tensor a row, so their lengths must be known
on the host. Here they are a mask on the device, so that no update waits for the GPU; the numbers are the same. As there,
image and text are each filled up to a multiple of 32 tokens with learned ones, which are attended to.

    sample  -> patches of 2 x 2 -> noise_refiner  \\
                                                    layers -> final layer -> minus the velocity
    text    -> cap_embedder -> context_refiner    /
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock
from torch import nn
from torch.nn import functional

from stepdistill.models.network.conditioning import MASK, Conditioning
from stepdistill.models.network.places import blocks_on_the_way, modules_at, thirds
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.layouts import LAYOUTS

# The projections of attention and feed-forward layers. The modulation is left out: its layers depend on the timestep alone.
LORA_TARGETS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
_OF_IMAGE = ("layers.", "noise_refiner.")
"""Where the modules are whose outputs begin with the image's tokens."""
_TIMESTEPS = 1000
"""T: the pipeline gives the network 1 - t / T."""


class ZImageKind:
    """The NetworkKind of ZImageTransformer2DModel; its features are image tokens on their grid, after layers on the way."""

    component = "transformer"
    network_class = ZImageTransformer2DModel
    pipeline_classes = (ZImagePipeline,)
    lora_targets = LORA_TARGETS
    compiled_blocks = (ZImageTransformerBlock,)

    def encoder_lora_targets(self, network: ZImageTransformer2DModel) -> str:
        """The LoRA targets in the refiners and in the layers that `features` runs."""
        names = "|".join(name.replace(".", r"\.") for name in LORA_TARGETS)
        layers = "|".join(map(str, range(_feature_layers(network)[-1])))
        return rf"(?:(?:noise|context)_refiner\.\d+|layers\.(?:{layers}))\.(?:{names})"

    def random_conditioning(self, facts: TeacherFacts, rows: int, *, dtype: torch.dtype) -> Conditioning:
        """Texts of the greatest length."""
        tokens = facts.text_tokens
        hidden = torch.randn(rows, tokens, int(facts.network.get("cap_feat_dim", 2560)), dtype=dtype)
        # as if the rows were of several lengths, which takes more
        return Conditioning(hidden, {MASK: torch.ones(rows, tokens, dtype=torch.bool)})

    def ask(
        self,
        network: ZImageTransformer2DModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Forward pass: the velocity (B, C, H, W); all inputs but the timesteps are in the network's dtype."""
        sequence = _embedded(network, sample, timesteps, conditioning)
        tokens = sequence.tokens
        for layer in network.layers:
            tokens = _run(network, layer, tokens, sequence)
        final = network.all_final_layer[_key(network)](tokens[:, : sequence.image_tokens], c=sequence.emb)
        patch = _patch_size(network)
        pixels = final.unflatten(2, (patch, patch, -1)).unflatten(1, _grid(network, sample.shape[-2:]))
        return -pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def features(
        self,
        network: ZImageTransformer2DModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> list[torch.Tensor]:
        """Features (B, width, H / patch, W / patch): the image tokens after the layers at a quarter, half and two thirds."""
        sequence = _embedded(network, sample, timesteps, conditioning)
        tokens, depths, features = sequence.tokens, _feature_layers(network), []
        for number, layer in enumerate(network.layers[: depths[-1]], start=1):
            tokens = _run(network, layer, tokens, sequence)
            image = tokens[:, : sequence.image_tokens].transpose(1, 2)
            if number in depths:
                features.append(image.unflatten(2, _grid(network, sample.shape[-2:])))
        return features

    def modules_at(self, network: ZImageTransformer2DModel, tap: str) -> list[str]:
        """The layers at a place, each a third of all, or the module of this name; ValueError if there is none."""
        names = modules_at(network, tap, thirds([f"layers.{index}" for index in range(len(network.layers))]))
        if not names[0].startswith(_OF_IMAGE) or "adaLN" in names[0]:
            raise ValueError(
                f"got {tap!r}, which the image's tokens do not pass; allowed: encoder, middle, decoder, or a part of layers"
            )
        return names

    def image_part(
        self, network: ZImageTransformer2DModel, output: torch.Tensor, latent_size: tuple[int, int]
    ) -> torch.Tensor:
        """The first tokens (B, tokens, width): those of the text come behind them."""
        return output[:, : math.prod(_grid(network, latent_size))]

    def call_options(self, pipeline: ZImagePipeline) -> dict[str, Any]:
        """The number of tokens, if the tokenizer has fewer than the pipeline's default."""
        tokenizer = getattr(pipeline, "tokenizer", None)
        return LAYOUTS["ZImagePipeline"].call_options(getattr(tokenizer, "model_max_length", None))

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """One less: the pipeline adds w (v(text) - v("")) to v(text), and 0 is off."""
        return guidance_scale - 1.0

    def unconditional_options(
        self, _pipeline: ZImagePipeline, _unconditional: str, _count: int
    ) -> dict[str, Any]:
        """None: the pipeline encodes "", and ladder_fit.py allows nothing else."""
        return {}

    def encode(
        self, pipeline: ZImagePipeline, prompts: list[str], *, image_size: tuple[int, int]
    ) -> Conditioning:
        """The tokens of each prompt, filled up to a multiple of 32 with zeros; of any image_size."""
        del image_size
        texts, _ = pipeline.encode_prompt(
            list(prompts),
            device=pipeline.device,
            do_classifier_free_guidance=False,
            **self.call_options(pipeline),
        )
        tokens = _filled(max(map(len, texts)))
        hidden = torch.stack([functional.pad(text, (0, 0, 0, tokens - len(text))) for text in texts])
        lengths = torch.tensor([len(text) for text in texts], device=hidden.device)
        mask = torch.arange(tokens, device=hidden.device) < lengths[:, None]
        return Conditioning(hidden, {MASK: mask}, least_tokens=min(map(len, texts)))

    def feature_shapes(self, network: ZImageTransformer2DModel, sample_size: int) -> list[tuple[int, int]]:
        """(width, smaller side of the grid of tokens) of each feature."""
        side = max(1, sample_size // _patch_size(network))
        return [(network.config.dim, side)] * len(_feature_layers(network))

    def encoder_copy(self, network: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
        """A copy without the layers behind the deepest feature."""
        encoder = copy.deepcopy(network)
        encoder.layers = encoder.layers[: _feature_layers(network)[-1]]
        encoder.all_final_layer = nn.ModuleDict()
        return encoder


@dataclass(frozen=True)
class _Sequence:
    """What the layers are given.

    tokens        (B, n, width): of the image, filled up; then of the text
    image_tokens  how many of them are the image's own
    mask          (B, n), bool: which are attended to; None: all
    rotations     (B, n, head width / 2), complex: the rotary position embedding
    emb           (B, m): the embedding of the timestep
    """

    tokens: torch.Tensor
    image_tokens: int
    mask: torch.Tensor | None
    rotations: torch.Tensor
    emb: torch.Tensor


def _embedded(
    network: ZImageTransformer2DModel,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> _Sequence:
    """Image and text as tokens, each after its own refiner."""
    emb = network.t_embedder((_TIMESTEPS - timesteps) / _TIMESTEPS * network.t_scale).to(sample.dtype)
    text = conditioning.filled_up(_filled(conditioning.encoder_hidden_states.shape[1]))
    lengths = text.added_cond_kwargs[MASK].sum(1)
    attended = _filled(lengths)  # (B,): the text's tokens with the learned ones
    image, count = _image_tokens(network, sample)
    at_image = _rotations(network, _image_positions(network, sample, attended))
    of_image = _Sequence(image, count, None, at_image, emb)
    for block in network.noise_refiner:
        image = _run(network, block, image, of_image)
    words = _text_tokens(network, text)
    places = torch.arange(1, words.shape[1] + 1, device=sample.device)
    at_text = _rotations(network, functional.pad(places[None, :, None], (0, 2)).expand(len(words), -1, -1))
    is_seen = None  # where every row is filled up to the end, and all tokens are attended to
    if _filled(max(1, text.least_tokens)) < words.shape[1]:
        is_seen = torch.arange(words.shape[1], device=sample.device) < attended[:, None]
    for block in network.context_refiner:
        words = _run(network, block, words, _Sequence(words, 0, is_seen, at_text, emb))
    mask = None if is_seen is None else functional.pad(is_seen, (image.shape[1], 0), value=True)
    rotations = torch.cat([at_image, at_text], dim=1)
    return _Sequence(torch.cat([image, words], dim=1), count, mask, rotations, emb)


def _image_tokens(network: ZImageTransformer2DModel, sample: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The patches as tokens (B, n, width), with the learned ones that fill them up; and how many are patches."""
    patch = _patch_size(network)
    pixels = sample.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    patches = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    tokens = network.all_x_embedder[_key(network)](patches)
    count = tokens.shape[1]
    filling = network.x_pad_token.expand(len(sample), _filled(count) - count, -1)
    return torch.cat([tokens, filling.to(tokens.dtype)], dim=1), count


def _text_tokens(network: ZImageTransformer2DModel, text: Conditioning) -> torch.Tensor:
    """The text as tokens (B, n, width), with the learned one behind its end."""
    embedded = network.cap_embedder(text.encoder_hidden_states)
    is_text = text.added_cond_kwargs[MASK][..., None]
    return torch.where(is_text, embedded, network.cap_pad_token.to(embedded.dtype))


def _image_positions(
    network: ZImageTransformer2DModel, sample: torch.Tensor, text_lengths: torch.Tensor
) -> torch.Tensor:
    """(B, n, 3): the place behind the text, row and column of each patch; zeros for the tokens that fill up."""
    device, (height, width) = sample.device, _grid(network, sample.shape[-2:])
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    behind = (text_lengths + 1)[:, None].expand(-1, len(rows))
    grid = torch.stack([behind, rows.expand_as(behind), columns.expand_as(behind)], dim=2)
    return functional.pad(grid, (0, 0, 0, _filled(len(rows)) - len(rows)))


def _rotations(network: ZImageTransformer2DModel, positions: torch.Tensor) -> torch.Tensor:
    return network.rope_embedder(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])


def _run(
    network: ZImageTransformer2DModel, block: nn.Module, tokens: torch.Tensor, sequence: _Sequence
) -> torch.Tensor:
    """The tokens after a block, with gradient checkpointing if the network has it on."""
    inputs = (tokens, sequence.mask, sequence.rotations, sequence.emb)
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def _grid(network: ZImageTransformer2DModel, latent_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = _patch_size(network)
    return latent_size[0] // patch, latent_size[1] // patch


def _filled(count: Any) -> Any:
    """The next multiple of 32 tokens, of a number or of each in a tensor."""
    return count + -count % SEQ_MULTI_OF


def _patch_size(network: ZImageTransformer2DModel) -> int:
    return network.config.all_patch_size[0]


def _key(network: ZImageTransformer2DModel) -> str:
    """The name of the layers that embed patches of one image and make them again."""
    return f"{_patch_size(network)}-{network.config.all_f_patch_size[0]}"


def _feature_layers(network: ZImageTransformer2DModel) -> list[int]:
    """The numbers of layers, counted from 1, after which features are taken; of a copy by `encoder_copy` too."""
    return blocks_on_the_way(network.config.n_layers)
