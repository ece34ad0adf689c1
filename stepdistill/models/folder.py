"""What a complete diffusers pipeline folder holds, checked without torch, so that a wrong path costs no time."""

import json
import re
from pathlib import Path
from typing import Any, Literal

EMBEDDED_TEACHER = "letters"
DEFAULT_TIMESTEPS = 1000
"""num_train_timesteps of every Stable Diffusion, and of a scheduler_config.json without it."""
_NEEDS_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_NEEDS_FILE = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def embedded_folder(name: str) -> Path:
    """The folder of a part that ships in the package: "teacher" or "reader"."""
    return Path(__file__).parent.parent / "demo" / "assets" / name


def teacher_kind(path: str) -> Literal["folder", "file", "hub"]:
    """What `teacher.path` names: a pipeline's folder, one checkpoint file, or a repository of the Hub, such as org/name."""
    place = Path(path).expanduser()
    if path == EMBEDDED_TEACHER or place.is_dir():
        return "folder"
    if place.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        return "file"
    return "hub" if _HUB_ID.fullmatch(path) else "folder"


def missing_parts(folder: Path) -> list[str]:
    """What `folder` lacks to be a complete text-to-image pipeline in safetensors; empty when nothing.

    Only the files' presence is looked at: model_index.json, and for each part it names its config and weights.
    """
    if not folder.is_dir():
        return [f"no folder at {folder}"]
    index = folder / "model_index.json"
    if not index.is_file():
        return ["model_index.json (a complete diffusers pipeline folder is needed, not one part of it)"]
    try:
        parts = json.loads(index.read_text())
        pipeline_class = parts.get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        return [f"a readable model_index.json ({error})"]
    if pipeline_class not in _SUPPORTED:
        return [f"a pipeline of {' or '.join(_SUPPORTED)} (model_index.json says {pipeline_class})"]
    named = {name for name, part in parts.items() if isinstance(part, list) and part[0] is not None}
    required = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    if pipeline_class == "StableDiffusionXLPipeline":
        required |= {"text_encoder_2", "tokenizer_2"}
    missing = [f"{name} in model_index.json" for name in sorted(required - named)]
    for name in sorted(required & named):
        if name in _NEEDS_WEIGHTS:
            stem = _NEEDS_WEIGHTS[name]
            if not (folder / name / "config.json").is_file():
                missing.append(f"{name}/config.json")
            if not any((folder / name).glob(f"{stem}*.safetensors")):
                missing.append(f"{name}/{stem}.safetensors")
        elif not (folder / name / _NEEDS_FILE[name]).is_file():
            missing.append(f"{name}/{_NEEDS_FILE[name]}")
    return missing


def unsupported(folder: Path) -> list[str]:
    """What a complete folder has that this trainer cannot distil, each with what is allowed; empty when nothing."""
    index, unet, scheduler = (
        _config(folder / name)
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    found = []
    foreign = [
        f"{k}: {v[0]}" for k, v in index.items() if isinstance(v, list) and v[0] not in (*_LIBRARIES, None)
    ]
    if foreign:
        found.append(
            f"code of its own ({', '.join(foreign)}); allowed: classes of diffusers and transformers"
        )
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        found.append(f"a {unet['_class_name']}; allowed: a UNet2DConditionModel")
    channels = (unet.get("in_channels", 4), unet.get("out_channels", 4))
    if channels[0] != channels[1]:
        found.append(
            f"a U-Net of {channels[0]} input channels; allowed: {channels[1]}, as many as it puts out "
            f"(inpainting and image-editing models have more)"
        )
    for key, allowed in _PLAIN.items():
        if unet.get(key) not in allowed:
            found.append(f"a U-Net with {key}: {unet[key]}; allowed: {', '.join(map(str, allowed))}")
    if scheduler.get("trained_betas") is None and "beta_start" not in scheduler:
        found.append(
            f"the scheduler {scheduler.get('_class_name')} without betas; allowed: noise schedules as Stable Diffusion's"
        )
    return found


_PLAIN: dict[str, tuple[object, ...]] = {
    "class_embed_type": (None,),
    "time_cond_proj_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
}


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_zero_snr(folder: Path) -> bool:
    """Whether the teacher's noise schedule ends in pure noise (Lin et al. 2023, arXiv 2305.08891)."""
    return bool(_config(folder / "scheduler" / "scheduler_config.json").get("rescale_betas_zero_snr", False))


def num_train_timesteps(folder: Path) -> int:
    """T of the teacher's noise schedule, as its scheduler says."""
    config = _config(folder / "scheduler" / "scheduler_config.json")
    betas = config.get("trained_betas")
    return len(betas) if betas is not None else int(config.get("num_train_timesteps", DEFAULT_TIMESTEPS))


def prediction_type(folder: Path) -> str:
    """What the teacher predicts, as its scheduler says."""
    return str(_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon"))
