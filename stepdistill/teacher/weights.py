"""Compares the weights of a pipeline's parts with those that their configs ask for, by name, shape and type.

A part is built on torch's meta device, which has shapes but no numbers, so an absurd config costs neither memory nor time.
transformers would fill a tensor that the file lacks with random numbers, and both libraries would leave out one that the
model has no place for.
"""

import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stepdistill.messages import first_line
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import Header, read_headers, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, weights_variant

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Names of the layers in the VAE's attention before diffusers 0.18, whose loader still accepts them.
_OLD_SPELLING = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OF_WHOLE_MODELS = ("lm_head.",)  # of a language model, whose last layer no pipeline uses
_BUFFERS = ("position_ids",)  # counted up, not trained; earlier versions of transformers saved them


def build_part(facts: TeacherFacts, name: str) -> torch.nn.Module:
    """A part of a pipeline with weights, of the class that its layout names, in eval mode, on the default device."""
    library, (kind,) = facts.layout.parts[name]
    model, config = getattr(importlib.import_module(library), kind), dict(facts.configs[name])
    if library == "diffusers":
        return model.from_config(config).eval()
    return model(model.config_class.from_dict(config)).eval()


def build_without_weights(folder: Path, name: str) -> torch.nn.Module:
    """A part of a pipeline, built on the meta device from its config; ValueError if that is impossible."""
    path = folder / name / "config.json"
    read_object(path)  # its errors name the file
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return build_part(TeacherFacts.of_folder(folder), name)
    except Exception as error:  # the libraries raise many kinds of errors for another model's config
        raise ValueError(f"{path} describes no {name} that can be built: {first_line(error)}") from None


def folder_problems(folder: Path, name: str, net: torch.nn.Module) -> Iterator[str]:
    """How the weights in the folder of a part differ from those of `net`; ValueError if their headers cannot be read."""
    files = weight_files(folder / name, WEIGHTS[name], weights_variant(folder, name))
    yield from weight_problems(name, files[0], read_headers(files), net)


def check_weights(folder: Path, *names: str) -> None:
    """ValueError if a part of a pipeline's folder lacks a weight, has one too many, or one of another shape or type."""
    for name in names:
        problem = next(folder_problems(folder, name, build_without_weights(folder, name)), None)
        if problem is not None:
            raise ValueError(problem)


def weight_problems(name: str, file: Path, stored: Header, net: torch.nn.Module) -> Iterator[str]:
    """How the tensors of a part differ from the weights of `net`, each difference in one line that begins with the part.

    Args:
        name: the part, such as text_encoder.
        file: the file that holds the tensors, for the message.
        stored: the tensors under the names that diffusers or transformers gives them.
        net: the part as its config describes it.
    """
    prefix = _prefix_in_file(stored, net)
    header = {_spelled(key.removeprefix(prefix)): value for key, value in stored.items()}
    expected = {_spelled(key): tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    lacking = sorted(expected.keys() - header.keys() - _second_names(net))
    if lacking:
        yield f"{name}: {file} lacks {len(lacking)} of {len(expected)} weights, first {lacking[0]}"
        return
    unknown = sorted(key for key in header.keys() - expected.keys() if not _has_no_place(key, net))
    if unknown:
        yield (
            f"{name}: {file} holds {len(unknown)} weights for which its config.json has no place, first {unknown[0]}: "
            f"the config belongs to another model"
        )
    expected = {key: shape for key, shape in expected.items() if key in header}
    odd = [key for key, shape in expected.items() if header[key][1] != shape]
    if odd:
        shapes = f"is {header[odd[0]][1]} in the file and {expected[odd[0]]} by config.json"
        yield f"{name}: {len(odd)} weights of {file} have other shapes, first {odd[0]}, which {shapes}"
    yield from _odd_types(file, header, expected)


def _prefix_in_file(stored: Header, net: torch.nn.Module) -> str:
    """What stands before all keys of a file that was saved by the class of a whole model, such as Qwen3ForCausalLM, of which
    the pipeline takes the part `net`; "" for other files. transformers removes it too."""
    prefix = f"{getattr(net, 'base_model_prefix', '')}."
    expected = net.state_dict()
    is_there = prefix != "." and any(key.startswith(prefix) for key in stored)
    return "" if not is_there or any(key.startswith(prefix) for key in expected) else prefix


def _has_no_place(key: str, net: torch.nn.Module) -> bool:
    """Whether a tensor that `net` lacks may be in the file: a buffer, or a layer of the whole model."""
    is_of_whole = bool(getattr(net, "base_model_prefix", "")) and key.startswith(_OF_WHOLE_MODELS)
    return key.rpartition(".")[2] in _BUFFERS or is_of_whole


def _second_names(net: torch.nn.Module) -> set[str]:
    """The further names of tensors that have several, such as T5's embeddings; a file may hold such a tensor once."""
    first = {name for name, _ in net.named_parameters()}
    return {_spelled(name) for name, _ in net.named_parameters(remove_duplicate=False) if name not in first}


def _odd_types(file: Path, header: Header, expected: dict[str, Any]) -> Iterator[str]:
    odd = next((key for key in expected if header[key][0] not in _FLOATS), None)
    if odd is not None:
        yield f"{odd} of {file} is stored as {header[odd][0]}; allowed: {', '.join(_FLOATS)}"


def _spelled(key: str) -> str:
    """A weight's name in today's spelling, without the prefix that transformers 5 dropped."""
    match = re.fullmatch(r"(.*)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    key = f"{match[1]}.{_OLD_SPELLING[match[2]]}.{match[3]}" if match else key
    return key.removeprefix("text_model.")
