"""Checks without torch that a folder holds a complete diffusers pipeline, so that a wrong path costs no time."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from stepdistill.disk.places import is_folder
from stepdistill.messages import short
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import (
    Header,
    check_counts,
    read_header,
    read_headers,
    read_object,
    weight_files,
)
from stepdistill.teacher.scheduler import scheduler_problems

EMBEDDED_TEACHER = "letters"
SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Parts with weights, and the first part of their files' names."""
CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
"""The config's file of the parts where it is not config.json."""
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("transformers", ("*Tokenizer", "*TokenizerFast")),
    "tokenizer_2": ("transformers", ("*Tokenizer", "*TokenizerFast")),
    "scheduler": ("diffusers", ("*Scheduler",)),
}
"""Parts that a pipeline needs: their library, and the classes that are allowed."""
_OPTIONAL = {
    "safety_checker": "*.safetensors",
    "feature_extractor": "preprocessor_config.json",
    "image_encoder": "*.safetensors",
}
"""Parts that a pipeline loads only if model_index.json names them, and the file that they cannot do without."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "class_embed_type": (None,),
    "time_cond_proj_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
}
_LARGEST_LATENT = 2048  # a side; of 8 pixels each
_MAX_VAE_BLOCKS = 8
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def embedded_folder(name: str) -> Path:
    """The folder of a model that ships with the package: "teacher" or "reader"."""
    return Path(__file__).parent.parent / "demo" / "assets" / name


def teacher_kind(path: str) -> Literal["folder", "file", "hub"]:
    """What `teacher.path` names: a pipeline's folder, one checkpoint file, or a repository on the Hub, such as org/name."""
    place = Path(path).expanduser()
    if path == EMBEDDED_TEACHER or is_folder(place):
        return "folder"
    if place.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or os.path.isfile(place):
        return "file"
    return "hub" if _HUB_ID.fullmatch(path) else "folder"


def missing_parts(folder: Path, *, weights: bool = True) -> list[str]:
    """What `folder` lacks to be a complete text-to-image pipeline in safetensors; empty if nothing is missing.

    It checks only that files exist: model_index.json, and the config, weights and vocabulary of each part. weights=False
    leaves out the weights.
    """
    if not is_folder(folder):
        return [f"no folder at {folder}"]
    if not (folder / "model_index.json").exists():
        return ["model_index.json (a complete diffusers pipeline folder is needed, not one part of it)"]
    try:
        index = read_object(folder / "model_index.json")
    except ValueError as error:
        return [f"a readable model_index.json ({error})"]
    pipeline_class = index.get("_class_name")
    if pipeline_class not in SUPPORTED:
        return [f"a pipeline of {' or '.join(SUPPORTED)} (model_index.json says {short(pipeline_class)})"]
    missing = []
    for name in pipeline_parts(index):
        if not _is_named(index.get(name)):
            missing.append(f"{name} in model_index.json")
            continue
        config = folder / name / CONFIG_FILES.get(name, "config.json")
        if not config.exists():
            missing.append(f"{name}/{config.name}")
        if weights and name in WEIGHTS and not any((folder / name).glob(f"{WEIGHTS[name]}*.safetensors*")):
            missing.append(f"{name}/{WEIGHTS[name]}.safetensors")
        if name.startswith("tokenizer") and not has_vocabulary(folder / name):
            missing.append(f"{name}/tokenizer.json, or vocab.json and merges.txt")
    for name, file in _OPTIONAL.items() if weights else ():
        if _is_named(index.get(name)) and not any((folder / name).glob(file)):
            missing.append(f"{name}/{file}, or {name}: [null, null] in model_index.json")
    return missing


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether a tokenizer's folder holds a vocabulary; transformers would load a tokenizer even without one."""
    return (tokenizer / "tokenizer.json").exists() or all(
        (tokenizer / name).exists() for name in ("vocab.json", "merges.txt")
    )


def broken_files(folder: Path, *, header: Header | None = None) -> Iterator[str]:
    """Files of a complete folder that are not what their names say, each in one line; reads no weights.

    Args:
        folder: a pipeline's folder without `missing_parts`.
        header: the tensors of the checkpoint file that the folder's configs belong to; None: the weights are in the folder.
    """
    variant = weights_variant(folder)
    for name in pipeline_parts(TeacherFacts.of_folder(folder).configs["pipeline"]):
        try:
            config = read_object(folder / name / CONFIG_FILES.get(name, "config.json"))
            if name in WEIGHTS:
                tensors = header or _read_weights(folder / name, WEIGHTS[name], variant)
                check_counts(folder / name / "config.json", config, tensors)
        except ValueError as error:
            yield str(error)


def _read_weights(folder: Path, stem: str, variant: str | None) -> Header:
    """The tensors of a part's weights; also checks all other weights files in the folder, since hashes cover them."""
    files = weight_files(folder, stem, variant)
    for path in sorted(set(folder.glob("*.safetensors")) - set(files)):
        read_header(path)
    return read_headers(files)


def unsupported(folder: Path) -> list[str]:
    """Properties of a complete folder that this trainer cannot distil, each with what is allowed; empty if none."""
    facts = TeacherFacts.of_folder(folder)
    index, configs = facts.configs["pipeline"], facts.configs
    odd = [*_odd_classes(index)]
    for name, config in configs.items():
        version = config.get("_diffusers_version", "")
        if not isinstance(version, str):
            odd.append(f"a {name} of _diffusers_version {short(version)}; allowed: a version string")
    for name in WEIGHTS:
        if configs[name].get("quantization_config") is not None:
            odd.append(f"quantised weights in {name}; allowed: floating-point weights")
    odd += [*_odd_unet(configs["unet"]), *_odd_vae(configs["vae"])]
    odd += [*_odd_sizes(configs, index), *scheduler_problems(configs["scheduler"])]
    return odd


def _odd_classes(index: Mapping[str, Any]) -> Iterator[str]:
    foreign = {name: part for name, part in index.items() if isinstance(part, list) and _is_foreign(part)}
    if foreign:
        listed = ", ".join(f"{name}: {part[0] if part else part}" for name, part in foreign.items())
        yield f"code of its own ({listed}); allowed: classes of diffusers and transformers"
        return
    for name in pipeline_parts(index):
        library, kinds = _CLASSES[name]
        part = index[name]
        if len(part) != 2 or part[0] != library or not _is_one_of(part[1], kinds):
            yield f"{short(part)} as its {name}; allowed: {', '.join(k.replace('*', 'a ') for k in kinds)} of {library}"
    for name in _OPTIONAL.keys() & index.keys():
        if not isinstance(index[name], list) or len(index[name]) != 2:
            yield f"{short(index[name])} as its {name}; allowed: a library and a class, or neither: [null, null]"


def _odd_unet(unet: Mapping[str, Any]) -> Iterator[str]:
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        yield f"a {unet['_class_name']}; allowed: a UNet2DConditionModel"
    channels = (unet.get("in_channels", 4), unet.get("out_channels", 4))
    if channels[0] != channels[1]:
        yield (
            f"a U-Net of {channels[0]} input channels; allowed: {channels[1]}, as many as its output channels "
            f"(inpainting and image-editing models have more)"
        )
    for key, allowed in _PLAIN.items():
        if unet.get(key) not in allowed:
            yield f"a U-Net with {key}: {short(unet[key])}; allowed: {', '.join(map(str, allowed))}"
    size = unet.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if size is not None and not all(type(side) is int and 0 < side <= _LARGEST_LATENT for side in sides):
        yield (
            f"a U-Net with sample_size: {short(size)}; allowed: 1 to {_LARGEST_LATENT}, or such a height and width"
        )


def _odd_vae(vae: Mapping[str, Any]) -> Iterator[str]:
    scale = vae.get("scaling_factor", 0.18215)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        yield f"a VAE with scaling_factor: {short(scale)}; allowed: a number above 0"
    blocks = vae.get("block_out_channels", [0])
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_VAE_BLOCKS:
        yield f"a VAE with block_out_channels: {short(blocks)}; allowed: a list of 1 to {_MAX_VAE_BLOCKS}"


def _odd_sizes(configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> Iterator[str]:
    """Parts that do not fit together, as far as their configs show it."""
    unet, vae = configs["unet"], configs["vae"]
    channels = (unet.get("in_channels", 4), vae.get("latent_channels", 4))
    if channels[0] != channels[1]:
        yield f"a U-Net of {short(channels[0])} channels and a VAE of {short(channels[1])}; allowed: the same number"
    encoders = [name for name in pipeline_parts(index) if name.startswith("text_encoder")]
    widths: list[Any] = [configs[name].get("hidden_size") for name in encoders]
    width = unet.get("cross_attention_dim", 1280)
    if isinstance(width, int) and all(isinstance(part, int) for part in widths) and sum(widths) != width:
        yield (
            f"a U-Net with cross_attention_dim: {width} and text encoders of hidden_size "
            f"{' and '.join(map(str, widths))}; allowed: hidden sizes that add up to it"
        )


def weights_variant(folder: Path, part: str = "unet") -> str | None:
    """ "fp16" if the weights of a part exist in that variant only, else None."""
    names = [path.name for path in (folder / part).glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def pipeline_parts(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline of the class that model_index.json names."""
    second = ("text_encoder_2", "tokenizer_2")
    is_xl = index.get("_class_name") == "StableDiffusionXLPipeline"
    return sorted(name for name in _CLASSES if is_xl or name not in second)


def _is_named(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and part[0] is not None


def _is_foreign(part: list[Any]) -> bool:
    return not part or part[0] not in (*_LIBRARIES, None) or not all(isinstance(x, str | None) for x in part)


def _is_one_of(name: Any, kinds: tuple[str, ...]) -> bool:
    """Whether a class has one of these names; "*Scheduler" matches every name with that ending."""
    return isinstance(name, str) and any(
        name.isidentifier() and name.endswith(kind[1:]) if kind.startswith("*") else name == kind
        for kind in kinds
    )
