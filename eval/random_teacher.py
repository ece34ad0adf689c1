"""A pipeline of a real model family with random weights, for measuring memory and speed and for dry runs without downloads.

    python eval/random_teacher.py sd15|sd21_v|sdxl OUTPUT [--tiny] [--dtype float32|float16|bfloat16]

At full size, every tensor has the shape of the released model (from its config.json on the Hub). --tiny has the same kinds
of blocks, but few channels. The tokenizer is the one that ships with this package, so the tokens of a prompt mean nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.teacher.families import FAMILIES, family_configs
from stepdistill.teacher.folder import embedded_folder

_TOKENS = 77
_TINY_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_TINY: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 8}
    | {"block_out_channels": (16, 16, 32, 32)},
    "sd21_v": {
        "sample_size": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": (1, 2, 2, 2),
        "norm_num_groups": 8,
    }
    | {"block_out_channels": (16, 16, 32, 32), "use_linear_projection": True},
    "sdxl": {
        "sample_size": 8,
        "cross_attention_dim": 40,
        "attention_head_dim": (1, 2, 2),
        "norm_num_groups": 8,
    }
    | {"block_out_channels": (16, 16, 32), "use_linear_projection": True}
    | {"transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8}
    | {"projection_class_embeddings_input_dim": 24 + 6 * 8},
}


def unet_config(family: str, *, tiny: bool = False) -> dict[str, Any]:
    """The keyword arguments of UNet2DConditionModel for a family."""
    return {**family_configs(family)["unet"], **(_TINY[family] if tiny else {})}


def build(family: str, *, tiny: bool = False, seed: int = 0) -> DiffusionPipeline:
    """The pipeline of a family in float32, with random weights drawn from `seed`."""
    configs = family_configs(family)
    first, second, scheduler = (configs[part] for part in ("text_encoder", "text_encoder_2", "scheduler"))
    if tiny:
        first = first | _TINY_TEXT
        second = second and second | _TINY_TEXT | {"hidden_size": 24, "projection_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**unet_config(family, tiny=tiny)),
            "vae": build_vae(family, tiny=tiny),
            "text_encoder": CLIPTextModel(_text(first, tiny=tiny)),
        }
        if second:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text(second, tiny=tiny))
    for module in parts.values():
        module.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("teacher") / "tokenizer")
    tokenizer.model_max_length = _TOKENS
    parts["tokenizer"] = tokenizer
    if family == "sdxl":
        euler = EulerDiscreteScheduler(**scheduler, timestep_spacing="leading")
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, scheduler=euler)
    ddim = DDIMScheduler(**scheduler, clip_sample=False, set_alpha_to_one=False)
    plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, scheduler=ddim, **plain)


def build_vae(family: str, *, tiny: bool = False) -> AutoencoderKL:
    """The VAE of a family with random weights."""
    widths = (8, 8, 16, 16) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        norm_num_groups=8 if tiny else 32,
        scaling_factor=family_configs(family)["vae"]["scaling_factor"],
    )


def _text(options: dict[str, Any], *, tiny: bool) -> CLIPTextConfig:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("teacher") / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id}
    vocabulary = len(tokenizer) if tiny else 49408
    return CLIPTextConfig(**options, **ids, vocab_size=vocabulary, max_position_embeddings=_TOKENS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Makes a pipeline of a real model family with random weights."
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    pipeline = build(args.family, tiny=args.tiny).to(getattr(torch, args.dtype))
    pipeline.save_pretrained(args.output, safe_serialization=True)
    print(f"{args.output}: {sum(p.numel() for p in pipeline.unet.parameters()):,} parameters in the U-Net")
    return 0


if __name__ == "__main__":
    sys.exit(main())
