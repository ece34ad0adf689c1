"""The U-Net of Stable Diffusion and SDXL. Users of UNetKind need not know which of the two they have."""

import copy

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
    encoder_lora_targets = (
        r"(down_blocks|mid_block)\..*\.(" + "|".join(n.replace(".", r"\.") for n in LORA_TARGETS) + ")"
    )

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
        if places.get(tap):
            return places[tap]
        if tap in places:
            raise ValueError(f"got {tap!r}, but this network has no {tap}; allowed: encoder, decoder")
        try:
            network.get_submodule(tap)
        except AttributeError:
            raise ValueError(
                f"got {tap!r}, which names no module of the {type(network).__name__}; allowed: {', '.join(places)}, or a "
                f"module such as {places['decoder'][0]}"
            ) from None
        return [tap]

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


def _encoder_blocks(network: UNet2DConditionModel) -> list[nn.Module]:
    """The down blocks and the mid-block, which a smaller U-Net may lack."""
    middle = [] if network.mid_block is None else [network.mid_block]
    return [*network.down_blocks, *middle]
