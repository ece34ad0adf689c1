"""The U-Net of Stable Diffusion and SDXL. Users of UNetKind need not know which of the two they have."""

import copy
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.places import modules_at
from stepdistill.teacher.facts import TeacherFacts

_TOKENS = 77
# LCM-LoRA's list: every convolution and linear layer except conv_in, conv_out and the shared time embedding.
LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


class UNetKind:
    """The NetworkKind of UNet2DConditionModel; its features are those of the U-Net's encoder."""

    component = "unet"
    network_class = UNet2DConditionModel
    pipeline_classes = (StableDiffusionPipeline, StableDiffusionXLPipeline)
    lora_targets = LORA_TARGETS
    compiled_blocks = (BasicTransformerBlock, ResnetBlock2D)

    def encoder_lora_targets(self, _network: UNet2DConditionModel) -> str:
        """The LoRA targets in the down blocks and the mid-block."""
        names = "|".join(name.replace(".", r"\.") for name in LORA_TARGETS)
        return rf"(down_blocks|mid_block)\..*\.({names})"

    def random_conditioning(self, facts: TeacherFacts, rows: int, *, dtype: torch.dtype) -> Conditioning:
        """Text embeddings; for SDXL also pooled ones and time_ids."""
        config = facts.network
        tokens = int(facts.configs["text_encoder"].get("max_position_embeddings", _TOKENS))
        hidden = torch.randn(rows, tokens, int(config.get("cross_attention_dim", 768)), dtype=dtype)
        if config.get("addition_embed_type") != "text_time":
            return Conditioning(hidden)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {
            "text_embeds": torch.randn(rows, pooled, dtype=dtype),
            "time_ids": torch.full((rows, 6), 512.0),
        }
        return Conditioning(hidden, added)

    def ask(
        self,
        network: UNet2DConditionModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Forward pass: the output (B, C, H, W); all inputs but the timesteps are in the U-Net's dtype."""
        return network(
            sample,
            timesteps,
            encoder_hidden_states=conditioning.encoder_hidden_states,
            added_cond_kwargs=conditioning.added_cond_kwargs or None,
            return_dict=False,
        )[0]

    def features(
        self,
        network: UNet2DConditionModel,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> list[torch.Tensor]:
        """Features (B, C_i, H_i, W_i) after each down block and the mid-block, if there is one: the U-Net without its
        decoder."""
        hidden_states = conditioning.encoder_hidden_states
        added = conditioning.added_cond_kwargs or None
        emb = network.time_embedding(network.get_time_embed(sample=sample, timestep=timesteps))
        augmentation = network.get_aug_embed(
            emb=emb, encoder_hidden_states=hidden_states, added_cond_kwargs=added
        )
        emb = emb if augmentation is None else emb + augmentation
        hidden_states = network.process_encoder_hidden_states(
            encoder_hidden_states=hidden_states, added_cond_kwargs=added
        )
        state = network.conv_in(sample)
        features = []
        for block in _encoder_blocks(network):
            if getattr(block, "has_cross_attention", False):
                result = block(state, temb=emb, encoder_hidden_states=hidden_states)
            else:
                result = block(state, temb=emb)
            state = result[0] if isinstance(result, tuple) else result
            features.append(state)
        return features

    def modules_at(self, network: UNet2DConditionModel, tap: str) -> list[str]:
        """The blocks at a place, or the module of this name; ValueError if there is none."""
        places = {
            "encoder": [f"down_blocks.{index}" for index in range(len(network.down_blocks))],
            "middle": [] if network.mid_block is None else ["mid_block"],
            "decoder": [f"up_blocks.{index}" for index in range(len(network.up_blocks))],
        }
        return modules_at(network, tap, places)

    def image_part(
        self,
        _network: UNet2DConditionModel,
        output: torch.Tensor | tuple[torch.Tensor, ...],
        _latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """The first of several: a down block's others are its skip connections."""
        return output[0] if isinstance(output, tuple) else output

    def call_options(self, _pipeline: DiffusionPipeline) -> dict[str, Any]:
        """None."""
        return {}

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """The same."""
        return guidance_scale

    def unconditional_options(
        self, pipeline: DiffusionPipeline, unconditional: str, count: int
    ) -> dict[str, Any]:
        """Zeros as the embedding of no prompt for SD, whose pipeline else takes that of ""; SDXL's has a setting."""
        zeros = unconditional_is_zeros(pipeline, unconditional)
        if isinstance(pipeline, StableDiffusionXLPipeline):
            pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
            return {}
        if not zeros:
            return {}
        tokens, width = pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim
        options = {"dtype": pipeline.unet.dtype, "device": pipeline.device}
        return {"negative_prompt_embeds": torch.zeros(count, tokens, width, **options)}

    def encode(
        self, pipeline: DiffusionPipeline, prompts: list[str], *, image_size: tuple[int, int]
    ) -> Conditioning:
        """Text embeddings; for SDXL also pooled ones, and time_ids of an image_size that is neither scaled nor cropped."""
        encoded = pipeline.encode_prompt(
            prompt=prompts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            return Conditioning(encoded[0])
        pooled = encoded[2]
        time_ids = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=torch.float32, device=pooled.device)
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(prompts), -1).clone()}
        return Conditioning(encoded[0], added)

    def feature_shapes(self, network: UNet2DConditionModel, sample_size: int) -> list[tuple[int, int]]:
        """(channels, smaller side) of each feature; every down block but the last halves the side."""
        channels = list(network.config.block_out_channels)
        last = len(channels) - 1
        blocks = [(c, max(1, sample_size >> min(i + 1, last))) for i, c in enumerate(channels)]
        return [*blocks, blocks[-1]][: len(_encoder_blocks(network))]

    def encoder_copy(self, network: UNet2DConditionModel) -> UNet2DConditionModel:
        """A copy without the decoder."""
        encoder = copy.deepcopy(network)
        encoder.up_blocks = nn.ModuleList()
        encoder.conv_norm_out, encoder.conv_out = None, nn.Identity()
        return encoder


def unconditional_is_zeros(pipeline: DiffusionPipeline, kind: str) -> bool:
    """Whether `kind`, a value of `teacher.unconditional`, means zeros for this pipeline, not the embedding of ""."""
    return kind == "zeros" or (
        kind == "auto" and bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
    )


def _encoder_blocks(network: UNet2DConditionModel) -> list[nn.Module]:
    """The down blocks and the mid-block, which a smaller U-Net may lack."""
    middle = [] if network.mid_block is None else [network.mid_block]
    return [*network.down_blocks, *middle]
