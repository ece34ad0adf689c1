"""The transformer of Stable Diffusion 3 and 3.5, in which text and image tokens attend to each other."""

import copy
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.places import blocks_on_the_way, modules_at, thirds
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.layouts import LAYOUTS

# The projections of attention and feed-forward layers, of image and text tokens. The modulation is left out: its layers
# depend on the timestep and the pooled text alone.
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_OF_TEXT_OUTPUT = ("add_q_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
"""What changes a block's text tokens alone, not its image tokens."""
_CLIP_TOKENS = 77


class SD3Kind:
    """The NetworkKind of SD3Transformer2DModel; its features are image tokens on their grid, after blocks on the way."""

    component = "transformer"
    network_class = SD3Transformer2DModel
    pipeline_classes = (StableDiffusion3Pipeline,)
    lora_targets = LORA_TARGETS
    compiled_blocks = (JointTransformerBlock,)

    def encoder_lora_targets(self, network: SD3Transformer2DModel) -> str:
        """The LoRA targets in the blocks that `features` runs, without those of the deepest that only text tokens pass."""
        deepest = _feature_blocks(network)[-1] - 1
        names = "|".join(name.replace(".", r"\.") for name in LORA_TARGETS)
        of_image = "|".join(name.replace(".", r"\.") for name in LORA_TARGETS if name not in _OF_TEXT_OUTPUT)
        before = "|".join(map(str, range(deepest))) or "none"
        return rf"transformer_blocks\.(?:({before})\..*\.({names})|{deepest}\..*\.({of_image}))"

    def random_conditioning(self, facts: TeacherFacts, rows: int, *, dtype: torch.dtype) -> Conditioning:
        """The tokens of CLIP and of T5, and pooled embeddings."""
        config = facts.network
        tokens = (
            int(facts.configs["text_encoder"].get("max_position_embeddings", _CLIP_TOKENS))
            + facts.text_tokens
        )
        hidden = torch.randn(rows, tokens, int(config.get("joint_attention_dim", 4096)), dtype=dtype)
        pooled = torch.randn(rows, int(config.get("pooled_projection_dim", 2048)), dtype=dtype)
        return Conditioning(hidden, {"pooled_projections": pooled})

    def ask(
        self,
        network: SD3Transformer2DModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Forward pass: the velocity (B, C, H, W); all inputs but the timesteps are in the network's dtype."""
        return network(
            hidden_states=sample,
            timestep=timesteps,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            pooled_projections=conditioning.added_cond_kwargs["pooled_projections"],
            return_dict=False,
        )[0]

    def features(
        self,
        network: SD3Transformer2DModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> list[torch.Tensor]:
        """Features (B, width, H / patch, W / patch): the image tokens after the blocks at a quarter, half and two thirds."""
        patch = network.config.patch_size
        height, width = (side // patch for side in sample.shape[-2:])
        tokens = network.pos_embed(sample).contiguous()
        emb = network.time_text_embed(timesteps, conditioning.added_cond_kwargs["pooled_projections"])
        text = network.context_embedder(conditioning.encoder_hidden_states)
        depths, features = _feature_blocks(network), []
        for number, block in enumerate(network.transformer_blocks[: depths[-1]], start=1):
            if torch.is_grad_enabled() and network.gradient_checkpointing:
                text, tokens = network._gradient_checkpointing_func(block, tokens, text, emb, None)
            else:
                text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=emb)
            if number in depths:
                features.append(tokens.transpose(1, 2).unflatten(2, (height, width)))
        return features

    def modules_at(self, network: SD3Transformer2DModel, tap: str) -> list[str]:
        """The blocks at a place, each a third of all, or the module of this name; ValueError if there is none."""
        names = [f"transformer_blocks.{index}" for index in range(len(network.transformer_blocks))]
        return modules_at(network, tap, thirds(names))

    def image_part(
        self,
        _network: SD3Transformer2DModel,
        output: torch.Tensor | tuple[torch.Tensor, ...],
        _latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """The second of several: a block gives its text tokens first."""
        return output[1] if isinstance(output, tuple) else output

    def call_options(self, pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
        """The number of T5's tokens, if its tokenizer has fewer than the pipeline's default."""
        tokenizer = getattr(pipeline, "tokenizer_3", None)
        return LAYOUTS["StableDiffusion3Pipeline"].call_options(getattr(tokenizer, "model_max_length", None))

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """The same."""
        return guidance_scale

    def unconditional_options(
        self, _pipeline: StableDiffusion3Pipeline, _unconditional: str, _count: int
    ) -> dict[str, Any]:
        """None: the pipeline encodes "", and ladder_fit.py allows nothing else."""
        return {}

    def encode(
        self, pipeline: StableDiffusion3Pipeline, prompts: list[str], *, image_size: tuple[int, int]
    ) -> Conditioning:
        """The tokens of three text encoders, one after the other, and the pooled embeddings of two; of any image_size."""
        del image_size
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self.call_options(pipeline),
        )
        return Conditioning(hidden, {"pooled_projections": pooled})

    def feature_shapes(self, network: SD3Transformer2DModel, sample_size: int) -> list[tuple[int, int]]:
        """(width, smaller side of the grid of tokens) of each feature."""
        side = max(1, sample_size // network.config.patch_size)
        return [(network.inner_dim, side)] * len(_feature_blocks(network))

    def encoder_copy(self, network: SD3Transformer2DModel) -> SD3Transformer2DModel:
        """A copy without the blocks behind the deepest feature."""
        encoder = copy.deepcopy(network)
        encoder.transformer_blocks = encoder.transformer_blocks[: _feature_blocks(network)[-1]]
        encoder.norm_out, encoder.proj_out = nn.Identity(), nn.Identity()
        return encoder


def _feature_blocks(network: SD3Transformer2DModel) -> list[int]:
    """The numbers of blocks, counted from 1, after which features are taken. Of a copy by `encoder_copy` too, whose last
    block is the deepest."""
    return blocks_on_the_way(network.config.num_layers)
