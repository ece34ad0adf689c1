"""`load_few_step` loads a rung into an ordinary diffusers pipeline, with all settings that the rung needs.

    pipeline = DiffusionPipeline.from_pretrained(...)
    load_few_step(pipeline, "runs/letters/rungs/4")      # or the kohya file
    image = pipeline("a purple letter m on pink").images[0]

It sets LoRA, scheduler, steps, guidance and, where the pipeline's default is another one, the image's size. What does not
fit, when loading or in a later call, raises an error or a warning (checks.py).
"""

import contextlib
import copy
import functools
import inspect
import json
import logging
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from stepdistill.disk.durable import sha256_file, unsealed
from stepdistill.export.exported import read_base, read_scheduler, scheduler_of
from stepdistill.export.kohya import HASH, hash_of_file, read_kohya
from stepdistill.export.rung import HEADER
from stepdistill.export.scheduler import step_options
from stepdistill.models.adapters import lora_layers, set_active
from stepdistill.models.identity import BaseIdentity, layer_shapes
from stepdistill.models.lora_file import Lora, lora_path, read_lora
from stepdistill.run.rungs import RECORD_NAME, RungRecord
from stepdistill.sampling.checks import (
    ADAPTER,
    LOADED,
    FewStepWarning,
    LoadedRung,
    call_options,
    check_call,
    check_dtypes,
    check_pipeline,
    check_saved,
    network_of,
    no_guidance,
)

__all__ = ["ADAPTER", "FewStepWarning", "load_few_step", "load_rung"]


def load_few_step(pipeline: DiffusionPipeline, path: str | Path, *, hotswap: bool = False) -> RungRecord:
    """Loads a rung so that `pipeline(prompt)` by default samples with the rung's steps and without guidance.

    Other adapters stay loaded; a rung that was loaded before is replaced. A pipeline that from_pipe makes of it shares
    LoRA and scheduler; call this function on it as well to set the default steps and guidance.

    Args:
        pipeline: a diffusers pipeline with the base that the LoRA belongs to.
        path: an exported rung's folder, or its kohya file.
        hotswap: overwrite the weights of the rung that is loaded, so that a compiled pipeline is not compiled again.
    Returns: the rung's record. ValueError if the file is damaged, is not a few-step LoRA, or is of another U-Net.
    """
    rung, lora = _read(Path(path))
    unet = network_of(pipeline)
    check_pipeline(pipeline, rung, lora or read_kohya(rung.weights, layer_shapes(unet), dict(unet.config)))
    check_dtypes(pipeline)
    _add_adapter(pipeline, rung.weights, hotswap=hotswap)
    vars(unet)[LOADED] = rung.record.sha256
    pipeline.scheduler = copy.deepcopy(rung.scheduler)
    pipeline.__class__ = _few_step_class(_vanilla(type(pipeline)))
    pipeline._few_step = rung
    return rung.record


def load_rung(pipeline: DiffusionPipeline, folder: Path) -> RungRecord:
    """Loads only the LoRA and the scheduler, for callers that pass steps and guidance in every call."""
    rung, _ = _read(folder)
    with _silent_about_text_encoders():
        pipeline.load_lora_weights(rung.weights.parent, weight_name=rung.weights.name)
    pipeline.scheduler = rung.scheduler
    return rung.record


def _read(path: Path) -> tuple[LoadedRung, Lora | None]:
    """The rung at a path, and its LoRA; None for a kohya file's LoRA, which can only be read for a given U-Net."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed: an exported rung's folder, or its kohya file")
    return (_read_file(path), None) if path.is_file() else _read_folder(path)


def _read_folder(folder: Path) -> tuple[LoadedRung, Lora]:
    is_rung = (folder / RECORD_NAME).exists()
    if not is_rung and (folder / "rungs").is_dir():
        raise ValueError(f"{folder} is a run; allowed: one of its rungs, such as {folder / 'rungs' / '4'}")
    if not is_rung or not (folder / "scheduler").is_dir():
        raise ValueError(
            f"{folder} holds no exported rung: run `stepdistill export` (pipelines/export.py) first; load other LoRAs with "
            f"pipeline.load_lora_weights"
        )
    weights, record = lora_path(folder), RungRecord.read(folder)
    if record is None:
        raise ValueError(
            f"{folder / RECORD_NAME} is not as it was written: it was changed or damaged; fix: copy the folder again, or "
            f"run `stepdistill distill` for its run"
        )
    if sha256_file(weights) != record.sha256:
        raise ValueError(
            f"{weights} is not the file that rung.json was written for: it was changed or damaged; "
            f"fix: copy the folder again, or `stepdistill distill`, which trains the rung again"
        )
    return LoadedRung(record, weights, read_scheduler(folder), read_base(folder)), read_lora(weights)


def _read_file(path: Path) -> LoadedRung:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        digest = hash_of_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}; fix: copy or export it again") from None
    if HEADER not in header:
        raise ValueError(
            f"{path} has no sampling settings in its header; allowed: a file that `stepdistill export` wrote into kohya/, "
            f"or a rung's folder"
        )
    try:
        facts = unsealed(json.loads(header[HEADER]))
        record = RungRecord.of_json(facts)
        if facts is None or record is None or not isinstance(facts.get("scheduler"), dict):
            raise ValueError("it was changed or damaged")
        scheduler, base = scheduler_of(facts["scheduler"]), BaseIdentity.of_json(facts["base"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that cannot be read ({error}); fix: export it again") from None
    if digest != header.get(HASH):
        raise ValueError(
            f"{path} is not as it was written: its tensors were changed or damaged; fix: copy or export it again"
        )
    return LoadedRung(record, path, scheduler, base)


def _add_adapter(pipeline: DiffusionPipeline, weights: Path, *, hotswap: bool) -> None:
    """Loads the LoRA at weight 1 beside the active adapters, in place of an earlier rung's."""
    unet = network_of(pipeline)
    active = dict.fromkeys(name for layer in lora_layers(unet) for name in layer.active_adapters)
    replaces = ADAPTER in (getattr(unet, "peft_config", None) or {})
    if replaces and not hotswap:
        pipeline.delete_adapters(ADAPTER)
    options = {"hotswap": True} if replaces and hotswap else {}
    with _silent_about_text_encoders():
        pipeline.load_lora_weights(weights.parent, weight_name=weights.name, adapter_name=ADAPTER, **options)
    if any(layer.disable_adapters for layer in lora_layers(unet)):
        pipeline.enable_lora()
    # load_lora_weights has made the new adapter the only active one
    set_active(lora_layers(unet), list(dict.fromkeys([*active, ADAPTER])))


@contextlib.contextmanager
def _silent_about_text_encoders() -> Iterator[None]:
    """Silences diffusers' warning about a LoRA without weights for the text encoders, which no rung has."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _few_step_class(cls: type[DiffusionPipeline]) -> Any:
    """A subclass of the pipeline's class whose call has the rung's steps and guidance as defaults.

    It has the name of the original class, which save_pretrained and from_pipe use; pickle and copy store the original class.
    """
    signature = inspect.signature(cls.__call__)

    class FewStep(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            rung: LoadedRung | None = getattr(self, "_few_step", None)
            if rung is None:  # constructed from another pipeline's components
                return super().__call__(*args, **kwargs)
            given = signature.bind_partial(self, *args, **kwargs).arguments
            kwargs |= _rung_options(self, rung, given, signature.parameters)
            strength = signature.parameters.get("strength")
            default = {} if strength is None else {"strength": strength.default}
            check_call(self, rung, {**default, **given})
            return super().__call__(*args, **kwargs)

        @functools.wraps(cls.save_pretrained)
        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            check_saved(self)
            return super().save_pretrained(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _empty_few_step, (cls,), self.__dict__

    FewStep.__name__, FewStep.__qualname__, FewStep.__module__ = (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    FewStep._vanilla_class = cls
    return FewStep


def _rung_options(
    pipeline: DiffusionPipeline, rung: LoadedRung, given: Mapping[str, Any], parameters: Container[str]
) -> dict[str, Any]:
    """The arguments that a call takes from the rung, because they are not among those given.

    parameters: names of all arguments of the pipeline's call.
    """
    options: dict[str, Any] = {}
    if not any(given.get(name) is not None for name in ("timesteps", "sigmas")):
        steps = given.get("num_inference_steps") or rung.record.student_steps
        options |= {"num_inference_steps": steps} if "num_inference_steps" not in given else {}
        options |= step_options(rung.scheduler, steps)
    if "max_sequence_length" not in given:
        options |= call_options(pipeline)
    if "guidance_scale" in parameters and "guidance_scale" not in given:
        options["guidance_scale"] = no_guidance(pipeline)
    size_is_open = "height" in parameters and not {"height", "width"} & given.keys()
    if rung.record.image_size is not None and size_is_open:
        options |= dict(zip(("height", "width"), rung.record.image_size, strict=True))
    return options


def _empty_few_step(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """An empty pipeline of the few-step subclass of `cls`, which pickle or copy then fills."""
    few_step = _few_step_class(cls)
    return few_step.__new__(few_step)


def _vanilla(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The original diffusers class of a few-step class, or `cls` itself."""
    return cls.__dict__.get("_vanilla_class", cls)
