"""Checks the header of a LoRA's file before diffusers and peft read it. No torch.

They take the config in a file's metadata as it is, and names of tensors and modules as regular expressions. So a file could
make them search for years, change the base model, or import a module. Files that trainers write do nothing of this.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepdistill.messages import first_line, short
from stepdistill.teacher.files import require_file

METADATA = "lora_adapter_metadata"
"""Key of a safetensors header under which diffusers stores peft's config as JSON."""
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Prefixes of the config's keys: the part of the pipeline that a key belongs to."""
_MAX_TEXT, _LONGEST_NAME, _LARGEST = 2**22, 500, 2**31
_TENSOR = re.compile(rf"[\w.-]{{1,{_LONGEST_NAME}}}", re.ASCII)
_MODULE = re.compile(rf"\^?[\w.-]{{1,{_LONGEST_NAME}}}\$?", re.ASCII)
"""A module's name, or the end of one, with the marks of its beginning and end that diffusers adds."""
_MAX_RANK = 2**16
_BY_MODULE = ("alpha_pattern", "rank_pattern")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_TEXTS = (
    "base_model_name_or_path",
    "bias",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
_INITIAL = (None, True, False, "gaussian")
"""Values of init_lora_weights that leave the base model as it is."""


def check_lora_header(path: Path) -> dict[str, Any]:
    """peft's config in a LoRA's file, {} if the file has none; ValueError of one line if the file cannot be read, or if its
    config or a tensor's name is more than the plain description of a LoRA."""
    require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text, names = (file.metadata() or {}).get(METADATA), list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path} as safetensors: {first_line(error)}") from None
    odd = next((name for name in names if not _TENSOR.fullmatch(name)), None)
    if odd is not None:
        raise ValueError(
            f"{path} has a tensor called {short(odd)}; allowed: up to {_LONGEST_NAME} letters, digits, dots, _ and -"
        )
    config = _object(path, text) if text else {}
    for key, value in config.items():
        part, _, name = key.partition(".")
        allowed = _refusal(name, value, most=len(names)) if part in PARTS else None
        if allowed is not None:
            raise ValueError(
                f"{path}: its {METADATA} has {short(key)}: {short(value)}; allowed: {allowed}; fix: train or convert the "
                f"LoRA without it"
            )
    return config


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"{len(text)} characters; allowed: up to {_MAX_TEXT}")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {METADATA} is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its {METADATA} is {type(content).__name__}; allowed: a JSON object")
    return content


def _refusal(name: str, value: Any, *, most: int) -> str | None:
    """What is allowed in place of a value of peft's config, or None if the value is; most: the file's number of tensors."""
    if name in _BY_MODULE:
        return (
            None if _is_pattern(name, value, most) else f"up to {most} names of modules, each with a number"
        )
    if name == "r":
        return None if _is_rank(value) else f"1 to {_MAX_RANK}"
    if name == "lora_alpha":
        return None if _is_number(value) else "a number"
    if name == "init_lora_weights":
        return None if value in _INITIAL else f"{_INITIAL[1:]}, which leave the base model as it is"
    if name in _NAMES and value:
        listed = value if isinstance(value, list) else [value]
        return None if all(map(_is_module, listed)) else "names of modules"
    if name == "layers_to_transform" and value:
        listed = value if isinstance(value, list) else [value]
        return None if all(type(layer) is int for layer in listed) else "numbers of layers"
    if name in _TEXTS and isinstance(value, str):
        return None if len(value) <= _LONGEST_NAME else f"up to {_LONGEST_NAME} characters"
    return None if value is None or value in ("", [], {}) or _is_number(value) else "nothing"


def _is_pattern(name: str, value: Any, most: int) -> bool:
    if value is None:
        return True
    fits = _is_rank if name == "rank_pattern" else _is_number
    return (
        isinstance(value, Mapping)
        and len(value) <= most
        and all(_is_module(key) and fits(number) for key, number in value.items())
    )


def _is_module(name: Any) -> bool:
    return isinstance(name, str) and _MODULE.fullmatch(name) is not None


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_RANK


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number of ordinary size; True and False count as numbers."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= _LARGEST
