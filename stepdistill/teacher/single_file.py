"""Compares a checkpoint in the original layout (CompVis, Stability, Z-Image) with the parts of a pipeline; reads its header.

diffusers' own functions rename the keys. They get tensors that have shapes but no numbers.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from stepdistill.messages import first_line
from stepdistill.teacher.files import Header, read_header
from stepdistill.teacher.source import UNET_PREFIX
from stepdistill.teacher.weights import weight_problems

_VAE_PREFIX = "first_stage_model."
# Prefixes of text encoders with the keys of transformers' CLIP, then of those with the keys of OpenCLIP.
_CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
_OF_OPEN_CLIP = (
    "text_projection",
    "logit_scale",
    "attn_mask",
)  # not of the text encoder that diffusers makes of it
_UNUSED = (
    "text_projection.weight",
    "logit_scale",
)  # of whole CLIP models; diffusers drops them if they have no place
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_Tensors = dict[str, torch.Tensor]


def file_problems(file: Path, nets: Mapping[str, Any]) -> Iterator[str]:
    """How a checkpoint's weights differ from those of a pipeline's parts, each in one line that begins with the part.

    nets: the parts that the file should hold, by name; they may be on the meta device. ValueError for an unreadable header.
    """
    header = read_header(file)
    tensors = {
        key: torch.empty(shape, dtype=_TYPES.get(kind, torch.uint8), device="meta")
        for key, (kind, shape) in header.items()
    }
    for name, net in nets.items():
        try:
            with _quiet():
                renamed = _renamed(name, tensors, net)
        except Exception as error:  # diffusers raises many kinds of errors for keys that it does not expect
            yield f"{name}: {file} holds no such {name} in a known layout ({type(error).__name__}: {first_line(error)})"
            continue
        if not renamed:
            yield f"{name}: {file} holds no {name}"
            continue
        has_place = net.state_dict().keys()
        stored: Header = {
            key: (_NAMES[tensor.dtype], tuple(tensor.shape))
            for key, tensor in renamed.items()
            if tensor is not None and (key in has_place or not key.endswith(_UNUSED))
        }
        problems = list(weight_problems(name, file, stored, net))
        yield from problems or _left_out(name, file, tensors, renamed)


def _renamed(name: str, tensors: _Tensors, net: Any) -> _Tensors:
    """The tensors of a part under diffusers' names."""
    if name == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(net.config))
    if name == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(net.config))
    if name == "transformer":
        return _renamed_transformer(tensors, net)
    prefix = _OPEN_CLIP[name]
    if any(key.startswith(prefix) for key in tensors):
        return single_file_utils.convert_open_clip_checkpoint(net, dict(tensors), prefix=prefix)
    clip_tensors = {
        key: tensor for key, tensor in tensors.items() if name == "text_encoder" and key.startswith(_CLIP)
    }
    return single_file_utils.convert_ldm_clip_checkpoint(clip_tensors)


def _renamed_transformer(tensors: _Tensors, net: Any) -> _Tensors:
    """The tensors of a transformer under diffusers' names; those that diffusers leaves out keep theirs, so have no place."""
    if net.state_dict().keys() <= tensors.keys():  # diffusers' own layout, which it reads too
        return tensors
    has_prefix = any(key.startswith(UNET_PREFIX) for key in tensors)
    of_it = {key: t for key, t in tensors.items() if key.startswith(UNET_PREFIX) or not has_prefix}
    rest = dict(of_it)
    renamed = SINGLE_FILE_LOADABLE_CLASSES[type(net).__name__]["checkpoint_mapping_fn"](rest)
    left = {key.removeprefix(UNET_PREFIX) for key in of_it} & rest.keys()
    return renamed | {key: rest[key] for key in left}


def _left_out(name: str, file: Path, tensors: _Tensors, renamed: _Tensors) -> Iterator[str]:
    """The tensors of a part that diffusers leaves out. transformers' CLIP needs no such check: all its keys are renamed."""
    if name == "transformer":  # _renamed_transformer keeps what diffusers leaves out
        return
    prefix = {"unet": UNET_PREFIX, "vae": _VAE_PREFIX}.get(name, _OPEN_CLIP.get(name, ""))
    used = {id(tensor) for tensor in renamed.values()} | {id(tensor._base) for tensor in renamed.values()}
    copied = f"{prefix}transformer."  # of OpenCLIP, whose transformer is renamed as a whole
    unknown = sorted(
        key
        for key, tensor in tensors.items()
        if key.startswith(prefix)
        and id(tensor) not in used
        and not key.startswith(copied)
        and not key.endswith(_OF_OPEN_CLIP)
    )
    if unknown:
        yield (
            f"{name}: {file} holds {len(unknown)} weights for which the {name} of teacher.config has no place, first "
            f"{unknown[0]}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on a file that also holds averaged weights."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
