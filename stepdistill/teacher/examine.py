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
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_header, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, parts_of_file, pipeline_parts, weights_variant
from stepdistill.teacher.layouts import layout_of
from stepdistill.teacher.single_file import file_problems
from stepdistill.teacher.tokenizer import class_of, use_tokenizer
from stepdistill.teacher.weights import build_without_weights, folder_problems


def examine_pipeline(folder: Path, file: Path | None = None) -> Iterator[str]:
    """The problems of a pipeline's folder, each in one line that begins with the part; none if the pipeline loads and draws.

    Args:
        folder: complete and of a supported kind, which teacher/folder.py checks.
        file: a checkpoint in the original layout that holds weights in place of the folder (folder.parts_of_file).
    """
    index = read_object(folder / "model_index.json")
    parts, layout = pipeline_parts(index), layout_of(index.get("_class_name"))
    nets, problems = _built(folder, [part for part in parts if part in WEIGHTS])
    in_file = parts_of_file(TeacherFacts.of_folder(folder)) if file is not None else ()
    in_folder = [name for name in nets if name not in in_file]
    for name in in_folder:
        try:
            problems += folder_problems(folder, name, nets[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if file is not None:
        problems += file_problems(file, {name: net for name, net in nets.items() if name in in_file})
    for name in [part for part in parts if part.startswith("tokenizer")]:
        encoder = nets.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        try:
            use_tokenizer(folder / name, index[name][1], encoder.config, layout)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems:
        problems += _runs(nets, TeacherFacts.of_folder(folder))
    yield from problems
    if not problems:
        yield from _not_finite(folder, in_folder, file)
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


def _runs(nets: dict[str, Any], facts: TeacherFacts) -> Iterator[str]:
    """The first part that fails on the outputs of the parts before it, by shapes alone."""
    name, asked = facts.network_part, _ASKED[facts.layout.network_class]
    network, tokenizer = nets[name], (facts.layout.text or (None,))[0]
    side = getattr(network.config, "sample_size", None) or 64
    height, width = (side, side) if isinstance(side, int) else side
    hidden, pooled, under_way = [], [], ""
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            for under_way in [part for part in nets if part.startswith("text_encoder")]:
                if under_way.replace("text_encoder", "tokenizer") == tokenizer:
                    count = facts.text_tokens
                else:
                    count = nets[under_way].config.max_position_embeddings
                output = nets[under_way](torch.zeros(1, count, dtype=torch.int64), output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
                pooled.append(output[0])
            under_way = name
            latents = torch.empty(1, network.config.in_channels, height, width)
            out = asked(network, latents, hidden, pooled)
            under_way = "vae"
            nets["vae"].encode(nets["vae"].decode(out).sample)
    except Exception as error:  # torch raises many kinds of errors for shapes that do not fit
        yield f"{under_way}: its config does not fit the other parts: {first_line(error)}"


def _asked_unet(
    unet: Any, latents: torch.Tensor, hidden: list[torch.Tensor], pooled: list[torch.Tensor]
) -> torch.Tensor:
    """The output of Stable Diffusion's or SDXL's U-Net."""
    added = {"text_embeds": pooled[-1], "time_ids": torch.empty(1, 6)} if len(hidden) > 1 else None
    timestep, states = torch.zeros(1, dtype=torch.int64), torch.cat(hidden, dim=-1)
    return unet(latents, timestep, encoder_hidden_states=states, added_cond_kwargs=added).sample


def _asked_sd3(
    transformer: Any, latents: torch.Tensor, hidden: list[torch.Tensor], pooled: list[torch.Tensor]
) -> torch.Tensor:
    """The output of SD3's transformer: CLIP's tokens, side by side and filled up to T5's width, before T5's."""
    clip = torch.cat(hidden[:2], dim=-1)
    clip = torch.nn.functional.pad(clip, (0, hidden[2].shape[-1] - clip.shape[-1]))
    return transformer(
        latents,
        encoder_hidden_states=torch.cat([clip, hidden[2]], dim=1),
        pooled_projections=torch.cat(pooled[:2], dim=-1),
        timestep=torch.zeros(1),
    ).sample


def _asked_z_image(
    transformer: Any, latents: torch.Tensor, hidden: list[torch.Tensor], _pooled: list[torch.Tensor]
) -> torch.Tensor:
    """The output of Z-Image's transformer, which takes and gives lists."""
    out = transformer([*latents.unsqueeze(2)], torch.zeros(1), [*hidden[0]], return_dict=False)[0]
    return torch.stack(out).squeeze(2)


_ASKED = {
    "UNet2DConditionModel": _asked_unet,
    "SD3Transformer2DModel": _asked_sd3,
    "ZImageTransformer2DModel": _asked_z_image,
}


def _not_finite(folder: Path, names: list[str], file: Path | None) -> Iterator[str]:
    if file is not None:
        key = not_finite([file])
        if key is not None:
            yield f"{key} of {file} holds numbers that are not finite: the file is damaged, or its training diverged"
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
