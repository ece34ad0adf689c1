"""Finds what is wrong with a teacher's folder, as far as possible without training, before anything costs time.

Every part is built on torch's meta device, which has shapes but no numbers. There its weights are compared by name and
shape (weights.py), and it is run once. The tokenizers are loaded and used. Finally every weight is read once, because
numbers that are not finite would spoil every rung.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from stepdistill.messages import first_line, short
from stepdistill.teacher.files import read_header, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, pipeline_parts, weights_variant
from stepdistill.teacher.single_file import file_problems
from stepdistill.teacher.tokenizer import class_of, use_tokenizer
from stepdistill.teacher.weights import build_without_weights, folder_problems


def examine_pipeline(folder: Path, file: Path | None = None) -> Iterator[str]:
    """The problems of a pipeline's folder, each in one line that begins with the part; none if the pipeline loads and draws.

    Args:
        folder: complete and of a supported kind, which teacher/folder.py checks.
        file: a checkpoint in the original layout that holds the weights, if the folder gives only configs and tokenizers.
    """
    index = read_object(folder / "model_index.json")
    parts = pipeline_parts(index)
    nets, problems = _built(folder, [part for part in parts if part in WEIGHTS])
    for name, net in nets.items() if file is None else ():
        try:
            problems += folder_problems(folder, name, net)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if file is not None:
        problems += file_problems(file, nets)
    for name in [part for part in parts if part.startswith("tokenizer")]:
        encoder = nets.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        try:
            use_tokenizer(folder / name, index[name][1], encoder.config)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems:
        problems += _runs(nets)
    yield from problems
    if not problems:
        yield from _not_finite(folder, list(nets), file)
    yield from _odd_scheduler(folder, index["scheduler"][1])


def _built(folder: Path, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The parts that can be built, by name, and the problems of the others."""
    nets: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        try:
            nets[name] = build_without_weights(folder, name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return nets, problems


def not_finite(paths: list[Path]) -> str | None:
    """Name of the first tensor in .safetensors files with a number that is not finite; None if all numbers are finite.

    ValueError if a file cannot be read.
    """
    for path in paths:
        read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not _is_finite(tensor):
                        return key
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {path}: {first_line(error)}") from None
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether the minimum and the maximum, which propagate nan, are finite: one fast pass without a second tensor."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _runs(nets: dict[str, Any]) -> Iterator[str]:
    """The first part that fails on the outputs of the parts before it, by shapes alone."""
    unet, name = nets["unet"], ""
    side = unet.config.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            hidden, pooled = [], None
            for name in [part for part in nets if part.startswith("text_encoder")]:
                tokens = torch.zeros(1, nets[name].config.max_position_embeddings, dtype=torch.int64)
                output = nets[name](tokens, output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
                pooled = output[0]
            name = "unet"
            latents = torch.empty(1, unet.config.in_channels, height, width)
            timestep = torch.zeros(1, dtype=torch.int64)
            added = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)} if len(hidden) > 1 else None
            states = torch.cat(hidden, dim=-1)
            out = unet(latents, timestep, encoder_hidden_states=states, added_cond_kwargs=added).sample
            name = "vae"
            nets["vae"].encode(nets["vae"].decode(out).sample)
    except Exception as error:  # torch raises many kinds of errors for shapes that do not fit
        yield f"{name}: its config does not fit the other parts: {first_line(error)}"


def _not_finite(folder: Path, names: list[str], file: Path | None) -> Iterator[str]:
    if file is not None:
        key = not_finite([file])
        if key is not None:
            yield f"{key} of {file} holds numbers that are not finite: the file is damaged, or its training diverged"
        return
    for name in names:
        files = weight_files(folder / name, WEIGHTS[name], weights_variant(folder, name))
        key = not_finite(files)
        if key is not None:
            yield (
                f"{name}: {key} of {files[0]} holds numbers that are not finite: the file is damaged, or its training "
                f"diverged"
            )


def _odd_scheduler(folder: Path, kind: str) -> Iterator[str]:
    scheduler_class = class_of(diffusers, kind, diffusers.SchedulerMixin)
    if scheduler_class is None:
        yield f"scheduler: model_index.json says {short(kind)}; allowed: a scheduler of diffusers"
        return
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler_class.from_config(read_object(path))
    except Exception as error:  # schedulers raise many kinds of errors for odd values
        yield f"scheduler: {path} describes no {kind} that can be built: {first_line(error)}"
