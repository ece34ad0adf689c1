"""Reads the files of a model that somebody else made: without trust, torch, running code, or holding much in memory.

A problem is a ValueError of one line that names the file: a pipe, a directory or a dangling link in its place, bytes that
are not JSON, a header of weights that does not match the length of its file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepdistill.messages import first_line, short

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensors of a weights file by name: dtype as safetensors writes it, such as F16, and shape."""

_MAX_JSON = 2**25
_LFS = b"version https://git-lfs"
# Keys of configs of diffusers and transformers for the number of a model's layers, each of which has its own tensors.
_LAYERS = (
    *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    *("num_hidden_layers", "num_layers", "n_layers", "n_refiner_layers"),
)
_BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
_WIDEST = 2**20


def require_file(path: Path) -> None:
    """ValueError unless a path is a regular file, or a link to one."""
    try:
        exists, regular, link = path.exists(), path.is_file(), path.is_symlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be accessed: {error.strerror}") from None
    if not exists:
        raise ValueError(f"{path} {'is a link to nothing' if link else 'does not exist'}")
    if not regular:
        raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'a pipe or a device'}, not a file")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError for anything else."""
    require_file(path)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; allowed: up to {_MAX_JSON}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; allowed: a JSON object")
    return content


def read_header(path: Path) -> Header:
    """The tensors that a .safetensors file declares; reads no weights. ValueError if its header or its length is wrong."""
    require_file(path)
    try:
        with path.open("rb") as start:
            pointer = start.read(len(_LFS)) == _LFS
        if pointer:
            raise ValueError(f"{path} is a pointer of Git LFS, not the weights; fix: git lfs pull")
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (str(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {first_line(error)}") from None


def read_headers(paths: list[Path]) -> Header:
    """The tensors of all files of one model together; ValueError if a file is broken or a tensor is in two files."""
    tensors: Header = {}
    for path in paths:
        header = read_header(path)
        twice = tensors.keys() & header.keys()
        if twice:
            raise ValueError(f"{path} holds {min(twice)}, which another file beside it holds too")
        tensors |= header
    return tensors


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files from which diffusers and transformers read a part's weights: one file, or those that an index names.

    Args:
        folder: the folder of one part of a pipeline.
        stem: first part of the file's name, such as diffusion_pytorch_model.
        variant: such as fp16; its files are preferred.
    ValueError if there are none, or if the index is broken or names anything but files beside it.
    """
    names = [f"{stem}.{variant}.safetensors"] if variant else []
    indices = [f"{stem}.safetensors.index.{variant}.json"] if variant else []
    for name in [*names, f"{stem}.safetensors"]:
        if _is_there(folder / name):
            return [folder / name]
    for name in [*indices, f"{stem}.safetensors.index.json"]:
        if _is_there(folder / name):
            return _of_index(folder / name)
    raise ValueError(f"{folder / f'{stem}.safetensors'} does not exist")


def _of_index(index: Path) -> list[Path]:
    places = read_object(index).get("weight_map")
    files = set(map(str, places.values())) if isinstance(places, dict) else set()
    odd = [name for name in files if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if odd or not files:
        raise ValueError(
            f"{index} names {short(odd[0]) if odd else 'no file'}; allowed: .safetensors files beside it"
        )
    return [index.parent / name for name in sorted(files)]


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def check_counts(path: Path, config: Mapping[str, Any], header: Header) -> None:
    """ValueError if a model's config asks for more layers than its weights have tensors, or for absurd widths.

    Without this check such a model would be built before the two are compared, which could take all time and memory.

    Args:
        path: the config's path, for the message.
        config: its content.
        header: the tensors of the weights that belong to it.
    """
    deepest: dict[str, int] = {}
    for key, value in _numbers(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if not -_WIDEST <= value <= _WIDEST:
            raise ValueError(f"{path}: {key} is {short(value)}; allowed: up to {_WIDEST}")
        name = key.rpartition(".")[2]
        if name in _LAYERS:
            deepest[name] = max(deepest.get(name, 1), value)
    blocks = max((len(config[key]) for key in _BLOCKS if isinstance(config.get(key), list)), default=1)
    layers = math.prod(deepest.values()) * max(blocks, 1)
    if layers > max(len(header), 1):
        raise ValueError(
            f"{path} asks for {layers} layers, but the weights beside it have only {len(header)} tensors"
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value in nested objects and lists, with its key; a value in a list has the list's key."""
    waiting = [(key, value)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, dict):
            waiting += [(f"{name}.{k}" if name else str(k), v) for k, v in node.items()]
        elif isinstance(node, list):
            waiting += [(name, part) for part in node]
        else:
            yield name, node
