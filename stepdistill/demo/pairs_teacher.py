"""Trains the teacher of the pairs world: a complete but small StableDiffusionXLPipeline that predicts v.

The parts are small instances of SDXL's classes: two text encoders, whose hidden states are joined and of which the second
also gives a pooled embedding; time ids; and AutoencoderKL with latents 4 x 12 x 12. Where a caption is dropped, the text is
zeros, as SDXL has it. `pipelines/train_teacher.py --world pairs` trains reader, VAE and U-Net in this order.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepdistill.demo import teacher as recipe
from stepdistill.demo.pairs import IMAGE_SIZE, PLACES, render_at, sample_pairs

MAX_TOKENS = 16
WIDTHS = (64, 128)
_TIME_ID_WIDTH = 8
TIME_IDS = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)
"""Original size, crop and target size of every image."""


def rendered_batch(num_images: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 48, 48) and int64 pairs (N, 6), in the order of Pair's fields."""
    pairs = sample_pairs(num_images, seed=seed)
    images = np.stack([np.asarray(render_at(pair, seed=seed, index=i)) for i, pair in enumerate(pairs)])
    labels = torch.tensor([list(vars(pair).values()) for pair in pairs])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer with one token per word of the captions."""
    places = [word for place in PLACES for word in place.split()]
    return recipe.build_tokenizer((*recipe.WORDS, *places), max_tokens=MAX_TOKENS)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, of width 64 with 3 layers, whose hidden states after the second SDXL reads."""
    config = recipe.text_config(tokenizer, layers=3)
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_unet(widths: tuple[int, int] = WIDTHS) -> UNet2DConditionModel:
    """A UNet2DConditionModel as SDXL has it; cross-attention only at the 6 x 6 level, which keeps CPU steps short."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * recipe.TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=recipe.TEXT_WIDTH + len(TIME_IDS) * _TIME_ID_WIDTH,
    )


def denoiser(
    unet: UNet2DConditionModel,
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    *,
    empty: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function from noisy latents, timesteps and tokens to the prediction; `empty` are the tokens of no text."""
    time_ids = torch.tensor(TIME_IDS, device=empty.device)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        is_asked = (ids != empty).any(dim=1).float()
        of_first = first(ids, output_hidden_states=True)
        of_second = second(ids, output_hidden_states=True)
        hidden = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], dim=-1)
        added = {
            "text_embeds": of_second.text_embeds * is_asked[:, None],
            "time_ids": time_ids.expand(len(ids), -1),
        }
        text = hidden * is_asked[:, None, None]
        return unet(noisy, timesteps, text, added_cond_kwargs=added).sample

    return predict


def train_pipeline(
    vae: AutoencoderKL,
    images: torch.Tensor,
    captions: Sequence[str],
    *,
    updates: recipe.Updates,
    widths: tuple[int, int] = WIDTHS,
    device: torch.device | str = "cpu",
) -> StableDiffusionXLPipeline:
    """Trains U-Net and text encoders together by v-prediction; images uint8 (N, 3, 48, 48)."""
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)
    tokenizer = build_tokenizer()
    torch.manual_seed(updates.seed)
    first, second = (encoder.to(device) for encoder in build_text_encoders(tokenizer))
    unet = build_unet(widths).to(device)
    encoded = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    predict = denoiser(unet, first, second, empty=encoded[-1].to(device))
    modules: list[nn.Module] = [unet, first, second]
    unet, first, second = recipe.train_denoiser(
        modules,
        predict,
        latents,
        encoded,
        updates=updates,
        noised=functools.partial(recipe.noised_by_diffusion, prediction_type="v_prediction"),
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=recipe.build_scheduler("v_prediction"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
