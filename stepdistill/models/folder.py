"""What a complete diffusers pipeline folder holds, checked without torch, so that a wrong path costs no time."""

import json
from pathlib import Path

EMBEDDED_TEACHER = "letters"
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
_SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def embedded_folder(name: str) -> Path:
    """The folder of a part that ships in the package: "teacher" or "reader"."""
    return Path(__file__).parent.parent / "demo" / "assets" / name


def resolve_model_folder(path: str) -> Path:
    """The pipeline folder that `teacher.path` names: the embedded one for "letters", else the path itself."""
    return embedded_folder("teacher") if path == EMBEDDED_TEACHER else Path(path).expanduser()


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
