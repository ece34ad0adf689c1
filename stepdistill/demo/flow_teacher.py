"""Trains the letters' teacher of SD3's classes: a complete but small StableDiffusion3Pipeline that matches flows.

The parts are small instances of SD3's classes: a transformer over 4 x 4 tokens of the letters' latents, two CLIP text
encoders and a T5, which reads 10 tokens in place of 256. `pipelines/train_teacher.py --family sd3` trains transformer and
text encoders together; the VAE is that of the letters' first teacher.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stepdistill.demo import teacher as recipe
from stepdistill.diffusion.rectified_flow import RectifiedFlow

HEADS, HEAD_WIDTH, LAYERS = 3, 32, 5
JOINT_WIDTH = 2 * recipe.TEXT_WIDTH
"""Of a text token: CLIP's two hidden states side by side."""


def build_transformer(*, heads: int = HEADS, layers: int = LAYERS) -> SD3Transformer2DModel:
    """An SD3Transformer2DModel over patches of 2 x 2 latents, of width 32 heads."""
    width = heads * HEAD_WIDTH
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=heads,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * recipe.TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_sentence_pieces() -> T5Tokenizer:
    """A T5Tokenizer with one token per word of the captions, and one per character of other words."""
    specials = ("<pad>", "</s>", "<unk>")
    characters = [f"{mark}{chr(code)}" for code in range(33, 127) for mark in ("", "\u2581")]
    pieces = dict.fromkeys([*(f"\u2581{word}" for word in recipe.WORDS), *characters])
    vocab = [*((piece, 0.0) for piece in specials), *((piece, -float(len(piece) < 3)) for piece in pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.model_max_length = recipe.MAX_TOKENS
    return tokenizer


def build_text_encoders(
    tokenizer: CLIPTokenizer, sentence_pieces: T5Tokenizer
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]:
    """Two CLIPs of width 64 with 3 layers, whose hidden states after the second SD3 reads, and a T5 of width 128."""
    clip = recipe.text_config(tokenizer, layers=3)
    t5 = T5Config(
        vocab_size=len(sentence_pieces),
        d_model=JOINT_WIDTH,
        d_ff=JOINT_WIDTH,
        d_kv=32,
        num_heads=4,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip), T5EncoderModel(t5)


def noised_by_flow(
    original: torch.Tensor, noise: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Noising of a rectified flow, at timesteps whose logits are normal (Esser et al. 2024, 2403.03206, Eq 19); the target
    is the velocity."""
    path = RectifiedFlow()
    way = torch.randn(len(original), generator=generator).sigmoid()
    timesteps = (way * path.num_train_timesteps).long().clamp(0, path.last_timestep)
    noisy = path.add_noise(original, noise, timesteps)
    return noisy, path.network_times(timesteps), noise - original


def denoiser(
    transformer: SD3Transformer2DModel,
    first: CLIPTextModelWithProjection,
    second: CLIPTextModelWithProjection,
    third: T5EncoderModel,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function from noisy latents, network times and tokens (B, 2 L), CLIP's before T5's, to the velocity, with the text
    that SD3's pipeline gives the transformer."""

    def predict(noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        of_clip, of_t5 = ids.chunk(2, dim=1)
        outputs = [encoder(of_clip, output_hidden_states=True) for encoder in (first, second)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return transformer(
            noisy,
            encoder_hidden_states=torch.cat([hidden, third(of_t5).last_hidden_state], dim=1),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], dim=-1),
            timestep=times,
        ).sample

    return predict


def train_pipeline(
    vae: AutoencoderKL,
    images: torch.Tensor,
    captions: Sequence[str],
    *,
    updates: recipe.Updates,
    device: torch.device | str = "cpu",
) -> StableDiffusion3Pipeline:
    """Trains transformer and text encoders together by flow matching; images uint8 (N, 3, 32, 32)."""
    latents = recipe.encode_images(vae, images, scaling_factor=vae.config.scaling_factor)
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline adds it
    tokenizers = recipe.build_tokenizer(), build_sentence_pieces()
    torch.manual_seed(updates.seed)
    encoders = [encoder.to(device) for encoder in build_text_encoders(*tokenizers)]
    transformer = build_transformer().to(device)
    options = {"padding": "max_length", "truncation": True, "max_length": recipe.MAX_TOKENS}
    tokens = [
        tokenizer([*captions, ""], **options, return_tensors="pt").input_ids for tokenizer in tokenizers
    ]
    modules: list[nn.Module] = [transformer, *encoders]
    transformer, first, second, third = recipe.train_denoiser(
        modules,
        denoiser(transformer, *encoders),
        latents,
        torch.cat(tokens, dim=1),
        updates=updates,
        noised=noised_by_flow,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=tokenizers[0],
        text_encoder_3=third,
        tokenizer_3=tokenizers[1],
    )
