"""Finds what is wrong with a teacher's folder, as far as possible without training, before anything costs time.

Every part is built on torch's meta device, which has shapes but no numbers. There its weights are compared by name and
shape, and it is run once, so that an absurd config costs neither memory nor time. The tokenizers are loaded and used.
Finally every weight is read once, because numbers that are not finite would spoil every rung.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.messages import first_line, short
from stepdistill.teacher.files import Header, read_header, read_headers, read_object, weight_files
from stepdistill.teacher.folder import WEIGHTS, pipeline_parts, weights_variant

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Names of the layers in the VAE's attention before diffusers 0.18, whose loader still accepts them.
_OLD_SPELLING = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_MOST_TOKENS = 4096


def examine_pipeline(folder: Path) -> Iterator[str]:
    """The problems of a pipeline's folder, each in one line that begins with the part; none if the pipeline loads and draws.

    The folder must be complete and of a supported kind, which teacher/folder.py checks.
    """
    index = read_object(folder / "model_index.json")
    parts = pipeline_parts(index)
    nets: dict[str, Any] = {}
    problems: list[str] = []
    for name in [part for part in parts if part in WEIGHTS]:
        try:
            nets[name] = _built(folder, name)
            problems += _wrong_weights(folder, name, nets[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
    for name in [part for part in parts if part.startswith("tokenizer")]:
        encoder = nets.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        try:
            _use_tokenizer(folder, name, index[name][1], encoder.config)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems:
        problems += _runs(nets)
    yield from problems
    if not problems:
        yield from _not_finite(folder, list(nets))
    yield from _odd_scheduler(folder, index["scheduler"][1])


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


def _built(folder: Path, name: str) -> torch.nn.Module:
    """A part, built on the meta device from its config; ValueError if that is impossible."""
    path = folder / name / "config.json"
    config = read_object(path)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            if name in kinds:
                return kinds[name].from_config(config).eval()
            return encoders[name](CLIPTextConfig.from_dict(config)).eval()
    except Exception as error:  # the libraries raise many kinds of errors for another model's config
        raise ValueError(f"{path} describes no {name} that can be built: {first_line(error)}") from None


def _wrong_weights(folder: Path, name: str, net: torch.nn.Module) -> Iterator[str]:
    """The differences between the weights on disk and those that the config asks for."""
    files = weight_files(folder / name, WEIGHTS[name], weights_variant(folder, name))
    header = {_spelled(key): value for key, value in read_headers(files).items()}
    expected = {_spelled(key): tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    lacking = sorted(expected.keys() - header.keys())
    if lacking:
        yield f"{name}: {files[0]} lacks {len(lacking)} of {len(expected)} weights, first {lacking[0]}"
        return
    odd = [key for key, shape in expected.items() if header[key][1] != shape]
    if odd:
        shapes = f"is {header[odd[0]][1]} in the file and {expected[odd[0]]} by config.json"
        yield f"{name}: {len(odd)} weights of {files[0]} have other shapes, first {odd[0]}, which {shapes}"
    yield from _odd_types(files[0], header, expected)


def _odd_types(file: Path, header: Header, expected: dict[str, Any]) -> Iterator[str]:
    odd = next((key for key in expected if header[key][0] not in _FLOATS), None)
    if odd is not None:
        yield f"{odd} of {file} is stored as {header[odd][0]}; allowed: {', '.join(_FLOATS)}"


def _spelled(key: str) -> str:
    """A weight's name in today's spelling, without the prefix that transformers 5 dropped."""
    match = re.fullmatch(r"(.*)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    key = f"{match[1]}.{_OLD_SPELLING[match[2]]}.{match[3]}" if match else key
    return key.removeprefix("text_model.")


def _use_tokenizer(folder: Path, name: str, kind: str, encoder: CLIPTextConfig) -> None:
    """ValueError if a tokenizer cannot be loaded, or gives tokens that its text encoder cannot take."""
    tokenizer_class = _class_of(transformers, kind, transformers.PreTrainedTokenizerBase)
    if tokenizer_class is None:
        raise ValueError(f"model_index.json says {short(kind)}; allowed: a tokenizer of transformers")
    try:
        tokenizer = tokenizer_class.from_pretrained(
            folder / name, local_files_only=True, trust_remote_code=False
        )
        length, largest_id = int(tokenizer.model_max_length), max(tokenizer.get_vocab().values())
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for broken files
        raise ValueError(f"cannot load {folder / name}: {first_line(error)}") from None
    most = encoder.max_position_embeddings
    if not 2 <= length <= min(most, _MOST_TOKENS):
        raise ValueError(
            f"{folder / name} has model_max_length {short(length)}; allowed: 2 to {most}, the limit of its text encoder"
        )
    if largest_id >= encoder.vocab_size:
        raise ValueError(
            f"{folder / name} has a token with id {largest_id}; its text encoder has {encoder.vocab_size} rows of embeddings"
        )
    try:
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        tokens = tokenizer("a photo of a cat", **options).input_ids
        word_ids = set(tokens) - set(tokenizer.all_special_ids)
    except Exception as error:  # as above
        raise ValueError(f"{folder / name} cannot encode a text: {first_line(error)}") from None
    if len(tokens) != length:
        raise ValueError(
            f"{folder / name} encodes a text as {len(tokens)} tokens instead of its model_max_length {length}"
        )
    if not word_ids:
        raise ValueError(f"{folder / name} knows no word of a simple text: its vocabulary is incomplete")


def _class_of(library: ModuleType, name: str, base: type) -> Any:
    """The class of that name in a library; None if there is no such class or it is not a subclass of `base`."""
    member = getattr(library, name, None)
    return member if isinstance(member, type) and issubclass(member, base) else None


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


def _not_finite(folder: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        files = weight_files(folder / name, WEIGHTS[name], weights_variant(folder, name))
        key = not_finite(files)
        if key is not None:
            yield (
                f"{name}: {key} of {files[0]} holds numbers that are not finite: the file is damaged, or its training "
                f"diverged"
            )


def _odd_scheduler(folder: Path, kind: str) -> Iterator[str]:
    scheduler_class = _class_of(diffusers, kind, diffusers.SchedulerMixin)
    if scheduler_class is None:
        yield f"scheduler: model_index.json says {short(kind)}; allowed: a scheduler of diffusers"
        return
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler_class.from_config(read_object(path))
    except Exception as error:  # schedulers raise many kinds of errors for odd values
        yield f"scheduler: {path} describes no {kind} that can be built: {first_line(error)}"
