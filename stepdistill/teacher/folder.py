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
from stepdistill.teacher.layouts import DISTILLED_PIPELINES, LAYOUTS, layout_of
from stepdistill.teacher.scheduler import scheduler_problems

EMBEDDED = {"letters": "teacher", "letters_sd3": "sd3/teacher", "pairs": "pairs/teacher"}
"""The models that ship with the package: their `teacher.path`, and the argument of embedded_folder."""
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""Parts with weights, and the first part of their files' names."""
CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
}
"""The config's file of the parts where it is not config.json."""
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
_PLAIN_Z_IMAGE: dict[str, object] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "siglip_feat_dim": None,
}
_VOCABULARIES = ("vocab.json and merges.txt", "spiece.model")
"""Of CLIP's tokenizers, and of T5's."""
_LARGEST_LATENT = 2048  # a side; of 8 pixels each
_LARGEST_PATCH = 16
_MAX_VAE_BLOCKS = 8
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


def embedded_folder(name: str) -> Path:
    """The folder of a model that ships with the package, such as "teacher" or "pairs/reader"."""
    return Path(__file__).parent.parent / "demo" / "assets" / name


def teacher_kind(path: str) -> Literal["folder", "file", "hub"]:
    """What `teacher.path` names: a pipeline's folder, one checkpoint file, or a repository on the Hub, such as org/name."""
    place = Path(path).expanduser()
    if path in EMBEDDED or is_folder(place):
        return "folder"
    if place.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or os.path.isfile(place):
        return "file"
    return "hub" if _HUB_ID.fullmatch(path) else "folder"


def missing_parts(folder: Path, *, weights: bool = True, but_network: bool = False) -> list[str]:
    """What `folder` lacks to be a complete text-to-image pipeline in safetensors; empty if nothing is missing.

    It checks only that files exist: model_index.json, and the config, weights and vocabulary of each part. weights=False
    leaves out the weights, but_network those of the part that is distilled.
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
    if not isinstance(pipeline_class, str) or pipeline_class not in LAYOUTS:
        distilled = DISTILLED_PIPELINES.get(str(pipeline_class))
        why = "" if distilled is None else f"; {distilled}: distil a base model"
        return [f"a pipeline of {' or '.join(LAYOUTS)} (model_index.json says {short(pipeline_class)}{why})"]
    missing = []
    for name in pipeline_parts(index):
        if not _is_named(index.get(name)):
            missing.append(f"{name} in model_index.json")
            continue
        config = folder / name / CONFIG_FILES.get(name, "config.json")
        if not config.exists():
            missing.append(f"{name}/{config.name}")
        asks_weights = (
            weights and name in WEIGHTS and not (but_network and name == layout_of(pipeline_class).network)
        )
        if asks_weights and not any((folder / name).glob(f"{WEIGHTS[name]}*.safetensors*")):
            missing.append(f"{name}/{WEIGHTS[name]}.safetensors")
        if name.startswith("tokenizer") and not has_vocabulary(folder / name):
            missing.append(f"{name}/tokenizer.json, or {_VOCABULARIES[name == 'tokenizer_3']}")
    for name, file in _OPTIONAL.items() if weights else ():
        if _is_named(index.get(name)) and not any((folder / name).glob(file)):
            missing.append(f"{name}/{file}, or {name}: [null, null] in model_index.json")
    return missing


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether a tokenizer's folder holds a vocabulary; transformers would load a tokenizer even without one."""
    return any(
        all((tokenizer / name).exists() for name in names)
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    )


def broken_files(folder: Path, *, header: Header | None = None) -> Iterator[str]:
    """Files of a complete folder that are not what their names say, each in one line; reads no weights.

    Args:
        folder: a pipeline's folder without `missing_parts`.
        header: the tensors of the checkpoint file that the folder's configs belong to (parts_of_file); None: the
            weights are in the folder.
    """
    facts = TeacherFacts.of_folder(folder)
    in_file = parts_of_file(facts) if header is not None else ()
    for name in pipeline_parts(facts.configs["pipeline"]):
        try:
            config = read_object(folder / name / CONFIG_FILES.get(name, "config.json"))
            if name in WEIGHTS:
                variant = weights_variant(folder, name)
                tensors = header if header is not None and name in in_file else None
                tensors = tensors or _read_weights(folder / name, WEIGHTS[name], variant)
                check_counts(folder / name / "config.json", config, tensors)
        except ValueError as error:
            yield str(error)


def parts_of_file(facts: TeacherFacts) -> list[str]:
    """The parts of a pipeline that a single checkpoint file holds: all of a U-Net's; a transformer alone, because the other
    parts of its pipeline are the same in all fine-tunes and larger than itself."""
    parts = [part for part in pipeline_parts(facts.configs["pipeline"]) if part in WEIGHTS]
    return parts if facts.network_part == "unet" else [facts.network_part]


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
    layout = layout_of(index.get("_class_name"))
    for name in layout.parts.keys() & WEIGHTS.keys():
        if configs[name].get("quantization_config") is not None:
            odd.append(f"quantised weights in {name}; allowed: floating-point weights")
    network = configs[layout.network]
    is_unet = layout.network == "unet"
    odd += [*(_odd_unet(network) if is_unet else _odd_transformer(network, layout.network_class))]
    odd += [
        *_odd_sample_size(network, layout.network),
        *_odd_vae(configs["vae"], is_unet=is_unet),
    ]
    odd += [*_odd_sizes(configs, index), *scheduler_problems(configs["scheduler"])]
    return odd


def _odd_classes(index: Mapping[str, Any]) -> Iterator[str]:
    foreign = {name: part for name, part in index.items() if isinstance(part, list) and _is_foreign(part)}
    if foreign:
        listed = ", ".join(f"{name}: {part[0] if part else part}" for name, part in foreign.items())
        yield f"code of its own ({listed}); allowed: classes of diffusers and transformers"
        return
    for name in pipeline_parts(index):
        library, kinds = layout_of(index.get("_class_name")).parts[name]
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


def _odd_transformer(transformer: Mapping[str, Any], kind: str) -> Iterator[str]:
    """kind: the class that the pipeline has."""
    if transformer.get("_class_name", kind) != kind:
        yield f"a {transformer['_class_name']}; allowed: a {kind}"
    channels = (transformer.get("in_channels", 16), transformer.get("out_channels"))
    if channels[1] is not None and channels[0] != channels[1]:
        yield f"a transformer of {channels[0]} input channels; allowed: {channels[1]}, as many as its output channels"
    if "all_patch_size" not in transformer:
        patch = transformer.get("patch_size", 2)
        if type(patch) is not int or not 1 <= patch <= _LARGEST_PATCH:
            yield f"a transformer with patch_size: {short(patch)}; allowed: 1 to {_LARGEST_PATCH}"
    for key, allowed in _PLAIN_Z_IMAGE.items() if kind == "ZImageTransformer2DModel" else ():
        if transformer.get(key, allowed) != allowed:
            yield f"a transformer with {key}: {short(transformer[key])}; allowed: {allowed}"


def _odd_sample_size(network: Mapping[str, Any], name: str) -> Iterator[str]:
    size = network.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if size is not None and not all(type(side) is int and 0 < side <= _LARGEST_LATENT for side in sides):
        what = "U-Net" if name == "unet" else name
        yield f"a {what} with sample_size: {short(size)}; allowed: 1 to {_LARGEST_LATENT}, or such a height and width"


def _odd_vae(vae: Mapping[str, Any], *, is_unet: bool) -> Iterator[str]:
    scale = vae.get("scaling_factor", 0.18215)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        yield f"a VAE with scaling_factor: {short(scale)}; allowed: a number above 0"
    shift = vae.get("shift_factor", 0.0 if is_unet else None)
    if (
        isinstance(shift, bool)
        or not isinstance(shift, int | float | None)
        or (shift is None and not is_unet)
    ):
        yield f"a VAE with shift_factor: {short(shift)}; allowed: a number"
    blocks = vae.get("block_out_channels", [0])
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_VAE_BLOCKS:
        yield f"a VAE with block_out_channels: {short(blocks)}; allowed: a list of 1 to {_MAX_VAE_BLOCKS}"


def _odd_sizes(configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> Iterator[str]:
    """Parts that do not fit together, as far as their configs show it."""
    layout = layout_of(index.get("_class_name"))
    network, vae, is_unet = configs[layout.network], configs["vae"], layout.network == "unet"
    channels = (network.get("in_channels", 4 if is_unet else 16), vae.get("latent_channels", 4))
    if channels[0] != channels[1]:
        what = "U-Net" if is_unet else layout.network
        yield f"a {what} of {short(channels[0])} channels and a VAE of {short(channels[1])}; allowed: the same number"
    if is_unet:
        yield from _odd_text_widths(network, "cross_attention_dim", 1280, configs, index)
    elif "cap_feat_dim" in network:
        lengths, tokens = network.get("axes_lens", [1024]), (layout.text or ("", 0))[1]
        if not isinstance(lengths, list) or type(lengths[0]) is not int or lengths[0] <= tokens:
            yield f"a transformer with axes_lens: {short(lengths)}; allowed: more than the {tokens} tokens of a text first"
        yield from _odd_text_widths(network, "cap_feat_dim", 2560, configs, index)


def _odd_text_widths(
    network: Mapping[str, Any],
    key: str,
    default: int,
    configs: Mapping[str, Mapping[str, Any]],
    index: Mapping[str, Any],
) -> Iterator[str]:
    """key: of the network's config, where it says how wide its text is."""
    encoders = [name for name in pipeline_parts(index) if name.startswith("text_encoder")]
    widths: list[Any] = [configs[name].get("hidden_size") for name in encoders]
    width = network.get(key, default)
    if isinstance(width, int) and all(isinstance(part, int) for part in widths) and sum(widths) != width:
        what = "U-Net" if key == "cross_attention_dim" else "transformer"
        yield (
            f"a {what} with {key}: {width} and text encoders of hidden_size {' and '.join(map(str, widths))}; allowed: "
            f"hidden sizes that add up to it"
        )


def weights_variant(folder: Path, part: str | None = None) -> str | None:
    """ "fp16" if the weights of a part, by default the network, exist in that variant only, else None."""
    part = part or TeacherFacts.of_folder(folder).network_part
    names = [path.name for path in (folder / part).glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def pipeline_parts(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline of the class that model_index.json names."""
    return sorted(layout_of(index.get("_class_name")).parts)


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
