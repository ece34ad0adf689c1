"""Makes the folder of a teacher that is a checkpoint file or a repository on the Hub, or has LoRAs to be merged.

This happens once; from then on it is a teacher's folder like any other.

RUN/teacher/         the pipeline, if a file was read or LoRAs were merged (merging is in float32, whatever the dtype)
RUN/teacher.json     what the teacher was made from, and its folder; written last
"""

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_json, read_sealed, warn_of_damage, whole_folder, write_sealed
from stepdistill.messages import first_line
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_header, weight_files
from stepdistill.teacher.fingerprints import TEXT_ENCODERS
from stepdistill.teacher.folder import WEIGHTS, pipeline_parts, teacher_kind, weights_variant
from stepdistill.teacher.layouts import layout_of
from stepdistill.teacher.loading import loading, local_options
from stepdistill.teacher.lora_trial import check_lora_numbers
from stepdistill.teacher.single_file import file_problems
from stepdistill.teacher.source import (
    TEACHER_RECORD,
    UNET_PREFIX,
    check_teacher_folder,
    is_ready_made,
    local_folder,
    made_folder,
    teacher_lora_file,
    teacher_source,
)

logger = logging.getLogger(__name__)
_SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def make_teacher(config: RunConfig) -> Path:
    """The teacher's folder, made if it does not exist yet; ConfigError for a file or LoRA that cannot be used."""
    if is_ready_made(config):
        return _examined(local_folder(config.teacher.path))
    record = config.run_dir / TEACHER_RECORD
    made = made_folder(config)
    if made is not None:
        return made
    if record.exists() and read_sealed(record) is None:
        warn_of_damage(record, "the teacher's folder is made again")
    path, kind = config.teacher.path, teacher_kind(config.teacher.path)
    if kind == "hub" and not config.teacher.loras:
        folder = _downloaded(config)
        check_teacher_folder(config, folder)
        write_sealed(record, {"teacher": teacher_source(config), "folder": str(_examined(folder).resolve())})
        return folder
    logger.info("prepare: making the teacher's folder from %s", path)
    pipeline = _of_file(config) if kind == "file" else _of_folder(config)
    dtypes = _dtypes(pipeline)
    if config.teacher.loras:
        _bake(pipeline, config)
    folder = config.run_dir / "teacher"
    with whole_folder(folder) as partial:
        for name, dtype in dtypes.items():
            getattr(pipeline, name).to(dtype)
        pipeline.save_pretrained(partial, safe_serialization=True)
    check_teacher_folder(config, folder)
    _examined(folder)
    write_sealed(record, {"teacher": teacher_source(config), "folder": "teacher"})
    return folder


def _examined(folder: Path) -> Path:
    """The folder itself; ConfigError if parts cannot be loaded, do not fit together or hold numbers that are not finite."""
    problems = list(examine_pipeline(folder))
    if problems:
        raise ConfigError(f"teacher.path: {'; '.join(problems)}")
    return folder


def _downloaded(config: RunConfig) -> Path:
    teacher = config.teacher
    try:
        folder = DiffusionPipeline.download(
            teacher.path,
            revision=teacher.revision,
            variant=teacher.variant,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the Hub's client raises many kinds of errors, each with its reason
        raise ConfigError(
            f"teacher.path: cannot get {teacher.path!r} from the Hub: {first_line(error)}; "
            f"allowed: a repository in its cache, one that can be reached (without HF_HUB_OFFLINE; a gated one after "
            f"`hf auth login`), or a folder on this disk"
        ) from None
    return Path(folder)


def _of_folder(config: RunConfig) -> DiffusionPipeline:
    path = config.teacher.path
    folder = _downloaded(config) if teacher_kind(path) == "hub" else local_folder(path)
    check_teacher_folder(config, folder)
    options = local_options(folder)
    if TeacherFacts.of_folder(folder).network_part == "transformer":
        options["dtype"] = _stored_dtypes(folder)
    with loading("teacher.path", folder):
        return DiffusionPipeline.from_pretrained(_examined(folder), **options)


def _of_file(config: RunConfig) -> DiffusionPipeline:
    """The pipeline that diffusers reads from a checkpoint in the original layout, in the dtype of its U-Net's weights."""
    file, configs = Path(config.teacher.path).expanduser(), config.teacher.config
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
            dtype = opened.get_tensor(min(keys, key=lambda key: (not key.startswith(UNET_PREFIX), key))).dtype
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"teacher.path: cannot read {file} as safetensors: {error}") from None
    pipeline_class: type[Any] = StableDiffusionXLPipeline if _SDXL_KEY in keys else StableDiffusionPipeline
    options: dict[str, Any] = {} if configs is None else {"config": configs}
    if configs is not None and Path(configs).expanduser().is_dir():
        folder = Path(configs).expanduser()
        named = (read_json(folder / "model_index.json") or {}).get("_class_name", "")
        options = {"config": str(folder), "local_files_only": True}
        pipeline_class = getattr(diffusers, named, pipeline_class)
        problems = list(examine_pipeline(folder, file))
        if problems:
            raise ConfigError(f"teacher.path: {'; '.join(problems)}")
        if layout_of(named).network == "transformer":
            return _with_transformer(file, folder, dtype)
    try:
        pipeline = pipeline_class.from_single_file(str(file), torch_dtype=dtype, **options)
        _check_complete(pipeline, file)
        return pipeline
    except Exception as error:  # a missing config, keys of another layout, shapes that do not fit
        raise ConfigError(
            f"teacher.path: cannot read {file} as a {pipeline_class.__name__}: {first_line(error)}; "
            f"teacher.config names the folder or repository whose configs belong to it"
        ) from None


def _with_transformer(file: Path, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a folder with the transformer of a file, each in the dtype that it is stored in; 8-bit floats become
    bfloat16, in which a network can be trained."""
    facts = TeacherFacts.of_folder(folder)
    network_class = getattr(diffusers, facts.layout.network_class)
    with loading("teacher.path", file):
        network = network_class.from_single_file(
            str(file),
            config=str(folder),
            subfolder=facts.network_part,
            torch_dtype=dtype if dtype.itemsize > 1 else torch.bfloat16,
            local_files_only=True,
        )
        given: dict[str, Any] = {facts.network_part: network, "dtype": _stored_dtypes(folder)}
        return DiffusionPipeline.from_pretrained(folder, **given, **local_options(folder, "vae"))


def _check_complete(pipeline: DiffusionPipeline, file: Path) -> None:
    """ValueError if the file lacked weights, which diffusers then leaves without data, or holds some that it left out."""
    nets = {name: part for name, part in pipeline.components.items() if name in WEIGHTS}
    for problem in file_problems(file, nets):
        raise ValueError(problem)


def _bake(pipeline: DiffusionPipeline, config: RunConfig) -> None:
    """Merges the LoRAs, each with its weight, into the network and the text encoders, in float32."""
    for name in pipeline.components.keys() & {_network_name(pipeline), *TEXT_ENCODERS}:
        getattr(pipeline, name).to(torch.float32)
    before = _sums(_network(pipeline))
    names = []
    for number, lora in enumerate(config.teacher.loras):
        file = teacher_lora_file(lora.path)
        names.append(f"teacher_{number}")
        with loading(f"teacher.loras.{number}.path", file):
            check_lora_numbers(file)
            pipeline.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=names[-1], use_safetensors=True
            )
        if names[-1] not in {name for part in pipeline.get_list_adapters().values() for name in part}:
            raise ConfigError(f"teacher.loras.{number}.path: {file} changes no layer of this model")
    pipeline.set_adapters(names, [lora.weight for lora in config.teacher.loras])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    if before == _sums(_network(pipeline)):
        raise ConfigError(
            f"teacher.loras: {[lora.path for lora in config.teacher.loras]} leave the network unchanged"
        )


def _dtypes(pipeline: DiffusionPipeline) -> dict[str, torch.dtype]:
    """The dtype in which each part is written: that of a U-Net for its whole pipeline, and beside a transformer each part's,
    as the text encoders would double."""
    nets = {name: part for name, part in pipeline.components.items() if name in WEIGHTS and part is not None}
    if _network_name(pipeline) == "unet":
        return dict.fromkeys(nets, pipeline.unet.dtype)
    return {name: part.dtype for name, part in nets.items()}


def _sums(network: torch.nn.Module) -> dict[str, float]:
    """The sum of squares of each weight, which differs if a LoRA was merged into it; a copy would double the memory."""
    return {name: tensor.double().square().sum().item() for name, tensor in network.state_dict().items()}


def _network(pipeline: DiffusionPipeline) -> Any:
    """The pipeline's network, which is distilled."""
    return getattr(pipeline, _network_name(pipeline))


def _network_name(pipeline: DiffusionPipeline) -> str:
    return layout_of(type(pipeline).__name__).network


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype in which the weights of each part are stored, of those that the folder has."""
    facts, names = TeacherFacts.of_folder(folder), {"F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for part in pipeline_parts(facts.configs["pipeline"]):
        if part in WEIGHTS and any((folder / part).glob("*.safetensors")):
            files = weight_files(folder / part, WEIGHTS[part], weights_variant(folder, part))
            kind, _ = next(iter(read_header(files[0]).values()))
            found[part] = names.get(kind, torch.float32)
    return found
