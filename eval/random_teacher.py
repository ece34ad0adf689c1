"""A pipeline of a real model family with random weights, for measuring memory and speed and for dry runs without downloads.

    python eval/random_teacher.py sd15|sd21_v|sdxl|sd35_medium|z_image OUTPUT [--tiny] [--dtype float32|float16|bfloat16]

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
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stepdistill.teacher.families import FAMILIES, TRANSFORMERS, family_configs
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
    if family in TRANSFORMERS:
        build_flow = _build_sd3 if family == "sd35_medium" else _build_z_image
        return build_flow(family, tiny=tiny, seed=seed)
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


_OF_VAE = ("latent_channels", "scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv")
_TINY_SD3: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16 + 24,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_TINY_T5 = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}


def _build_sd3(family: str, *, tiny: bool, seed: int) -> DiffusionPipeline:
    """A StableDiffusion3Pipeline in float32, with random weights."""
    configs = family_configs(family)
    first, second, third = (configs[f"text_encoder{number}"] for number in ("", "_2", "_3"))
    if tiny:
        first = first | _TINY_TEXT | {"projection_dim": 16}
        second = second | _TINY_TEXT | {"hidden_size": 16, "projection_dim": 24}
        third = third | _TINY_T5
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("teacher") / "tokenizer")
    tokenizer.model_max_length = _TOKENS
    sentence_pieces = _sentence_pieces(tokenizer)
    if tiny:
        third = third | {"vocab_size": len(sentence_pieces)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(**configs["transformer"] | (_TINY_SD3 if tiny else {})),
            "vae": build_vae(family, tiny=tiny),
            "text_encoder": CLIPTextModelWithProjection(_text(first, tiny=tiny)),
            "text_encoder_2": CLIPTextModelWithProjection(_text(second, tiny=tiny)),
            "text_encoder_3": T5EncoderModel(T5Config(**third)),
        }
    for module in parts.values():
        module.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=configs["scheduler"]["shift"])
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": sentence_pieces}
    return StableDiffusion3Pipeline(**parts, **tokenizers, scheduler=scheduler)


_TINY_Z_IMAGE: dict[str, Any] = {
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": (4, 6, 6),
    "axes_lens": (640, 64, 64),
}
_TINY_QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
}
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _build_z_image(family: str, *, tiny: bool, seed: int) -> DiffusionPipeline:
    """A ZImagePipeline in float32, with random weights."""
    configs = family_configs(family)
    tokenizer = _byte_tokenizer()
    text = configs["text_encoder"] | (_TINY_QWEN3 | {"vocab_size": len(tokenizer)} if tiny else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "transformer": ZImageTransformer2DModel(
                **configs["transformer"] | (_TINY_Z_IMAGE if tiny else {})
            ),
            "vae": build_vae(family, tiny=tiny),
            "text_encoder": Qwen3Model(Qwen3Config(**text)),
        }
        for learned in (parts["transformer"].x_pad_token, parts["transformer"].cap_pad_token):
            torch.nn.init.normal_(learned, std=0.02)
    for module in parts.values():
        module.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=configs["scheduler"]["shift"])
    return ZImagePipeline(**parts, tokenizer=tokenizer, scheduler=scheduler)


def _byte_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's class with one token per byte, and Qwen's form of a chat."""
    symbols = sorted(ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*symbols, *_QWEN_SPECIAL])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=list(_QWEN_SPECIAL[1:]))
    made.model_max_length = 4096
    made.chat_template = _CHAT
    return made


def _sentence_pieces(tokenizer: Any) -> T5Tokenizer:
    """A tokenizer of T5's class with the words of another one, at the beginning of words and inside them."""
    words = dict.fromkeys(sorted(piece.removesuffix("</w>") for piece in tokenizer.get_vocab()))
    pieces = [*_T5_SPECIAL, *(f"{mark}{word}" for word in words for mark in ("", "\u2581"))]
    made = T5Tokenizer(vocab=[(piece, 0.0 if piece in _T5_SPECIAL else -1.0) for piece in pieces])
    made.model_max_length = 512
    return made


def build_vae(family: str, *, tiny: bool = False) -> AutoencoderKL:
    """The VAE of a family with random weights."""
    config = family_configs(family)["vae"]
    widths = (8, 8, 16, 16) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        norm_num_groups=8 if tiny else 32,
        **{key: config[key] for key in _OF_VAE if key in config},
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
    parser.add_argument("family", choices=(*FAMILIES, *TRANSFORMERS))
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    pipeline = build(args.family, tiny=args.tiny).to(getattr(torch, args.dtype))
    pipeline.save_pretrained(args.output, safe_serialization=True)
    name = "transformer" if args.family in TRANSFORMERS else "unet"
    count = sum(p.numel() for p in pipeline.components[name].parameters())
    print(f"{args.output}: {count:,} parameters in its {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
