"""Tiny CLIP and DINOv2 models with random weights, saved as folders like a user's."""

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from stepdistill.teacher.folder import embedded_folder


def build_clip(folder):
    """Saves a CLIP for 32 x 32 images and 12 tokens."""
    torch.manual_seed(0)
    text = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(embedded_folder("teacher") / "tokenizer")
    tokenizer.model_max_length = 12
    size = {"shortest_edge": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=32), tokenizer).save_pretrained(folder)
    return folder


def build_dinov2(folder):
    """Saves a DINOv2 for 28 x 28 images."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=1
    )
    Dinov2Model(config).eval().save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(folder)
    return folder
