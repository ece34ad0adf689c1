"""`load_few_step`: a rung into a vanilla diffusers pipeline, with all that it needs to draw right.

    pipeline = DiffusionPipeline.from_pretrained(...)
    load_few_step(pipeline, "runs/letters/rungs/4")      # or the kohya file
    image = pipeline("a purple letter m on pink").images[0]

LoRA, scheduler, steps and guidance are set; another base, another scheduler, other steps and guidance are warned of.
"""

import copy
import functools
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from stepdistill.durable import read_json, sha256_file
from stepdistill.export.kohya import read_kohya, tensors_hash
from stepdistill.export.rung import BASE, HEADER
from stepdistill.export.scheduler import trained_timesteps
from stepdistill.models.adapters import lora_layers
from stepdistill.models.lora_file import Lora, check_fits, lora_path, read_lora
from stepdistill.models.sketch import base_weights, differs, sketch_of
from stepdistill.rungs import RungRecord

ADAPTER = "few_step"
"""The adapter's name in the pipeline: for set_adapters beside a style's."""


class FewStepWarning(UserWarning):
    """The pipeline draws, but not as the LoRA was trained."""


@dataclass(frozen=True)
class _Rung:
    """lora: None for kohya's file, whose names only a pipeline knows."""

    record: RungRecord
    weights: Path
    scheduler: DDIMScheduler
    base: Mapping[str, float]
    lora: Lora | None = None


def load_few_step(pipeline: DiffusionPipeline, path: str | Path, *, hotswap: bool = False) -> RungRecord:
    """Makes a pipeline draw as a rung does, by default: `pipeline(prompt)` takes its steps, without guidance.

    Adapters that are there stay; a rung that was loaded before gives way. Another pipeline made of this one by from_pipe has
    the LoRA and the scheduler, and takes the defaults by another call of this function.

    Args:
        pipeline: of diffusers, with the base that the LoRA belongs to.
        path: an exported rung's folder, or its kohya file.
        hotswap: put the weights into the place of the rung that is loaded, in a compiled pipeline without compiling again.
    Returns: the rung's record. ValueError where the file is damaged, no few-step LoRA, or of another U-Net.
    """
    rung = _read(Path(path))
    _check_base(pipeline, rung)
    _add_adapter(pipeline, rung.weights, hotswap=hotswap)
    pipeline.scheduler = copy.deepcopy(rung.scheduler)
    pipeline.__class__ = _few_step_class(_vanilla(type(pipeline)))
    pipeline._few_step = rung
    return rung.record


def load_rung(pipeline: DiffusionPipeline, folder: Path) -> RungRecord:
    """The LoRA and the scheduler alone, for whoever gives steps and guidance with every call."""
    rung = _read(folder)
    pipeline.load_lora_weights(rung.weights.parent, weight_name=rung.weights.name)
    pipeline.scheduler = rung.scheduler
    return rung.record


def _read(path: Path) -> _Rung:
    if not path.exists():
        raise ValueError(f"{path} is not there; allowed: an exported rung's folder, or its kohya file")
    return _of_file(path) if path.is_file() else _of_folder(path)


def _of_folder(folder: Path) -> _Rung:
    raw = read_json(folder / "rung.json")
    if raw is None or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(
            f"{folder} holds no exported rung: run `stepdistill export` (pipelines/export.py) first"
        )
    weights, record = lora_path(folder), _record(raw)
    if sha256_file(weights) != record.sha256:
        raise ValueError(
            f"{weights} is not the file that rung.json was written for: it was changed or damaged"
        )
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return _Rung(record, weights, scheduler, read_json(folder / BASE) or {}, read_lora(weights))


def _of_file(path: Path) -> _Rung:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    if text is None:
        raise ValueError(
            f"{path} does not say how it is sampled; allowed: a file that `stepdistill export` wrote into kohya/, or a "
            f"rung's folder"
        )
    facts = json.loads(text)
    if tensors_hash(load_file(path)) != facts["tensors_sha256"]:
        raise ValueError(f"{path} is not as it was written: its tensors were changed or damaged")
    return _Rung(_record(facts), path, DDIMScheduler.from_config(facts["scheduler"]), facts["base"])


def _record(raw: Mapping[str, Any]) -> RungRecord:
    known: dict[str, Any] = {field.name: raw[field.name] for field in fields(RungRecord) if field.name in raw}
    return RungRecord(**known)


def _check_base(pipeline: DiffusionPipeline, rung: _Rung) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in base_weights(pipeline.unet).items()}
    modules = [name.removesuffix(".weight") for name in shapes]
    lora = rung.lora or read_kohya(rung.weights, modules, pipeline.unet.config)
    check_fits(lora, shapes, name=str(rung.weights))
    if differs(rung.base, sketch_of(pipeline.unet)):
        _warn(
            f"{rung.weights} was trained on another base (fingerprint {rung.record.base_fingerprint}): shapes fit, weights "
            f"differ; pictures may be worse than the report says"
        )


def _add_adapter(pipeline: DiffusionPipeline, weights: Path, *, hotswap: bool) -> None:
    """Loads the LoRA at weight 1 beside what is active, in place of an earlier rung's."""
    if ADAPTER in (getattr(pipeline.unet, "peft_config", None) or {}):
        if hotswap:
            pipeline.load_lora_weights(
                weights.parent, weight_name=weights.name, adapter_name=ADAPTER, hotswap=True
            )
            return
        pipeline.delete_adapters(ADAPTER)
    layers = lora_layers(pipeline.unet)
    active = list(layers[0].active_adapters) if layers else []
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name, adapter_name=ADAPTER)
    for layer in lora_layers(pipeline.unet):  # loading makes the newest the only one
        layer.set_adapter([name for name in (*active, ADAPTER) if name in layer.lora_A])


def _few_step_class(cls: type) -> type:
    """The pipeline's class with a rung's steps and guidance as the defaults of its call. It keeps its name, which
    save_pretrained and from_pipe go by."""
    known = inspect.signature(cls.__call__)

    class FewStep(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = known.bind_partial(self, *args, **kwargs).arguments
            rung: _Rung = self._few_step
            if not given.get("timesteps") and not given.get("sigmas"):
                kwargs |= (
                    {}
                    if "num_inference_steps" in given
                    else {"num_inference_steps": rung.record.student_steps}
                )
            if "guidance_scale" in known.parameters and "guidance_scale" not in given:
                kwargs["guidance_scale"] = 1.0
            _check_call(self, rung, given)
            return super().__call__(*args, **kwargs)

    FewStep.__name__, FewStep.__qualname__, FewStep.__module__ = (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    FewStep._vanilla_class = cls
    return FewStep


def _vanilla(cls: type) -> type:
    return cls.__dict__.get("_vanilla_class", cls)


def _check_call(pipeline: DiffusionPipeline, rung: _Rung, given: Mapping[str, Any]) -> None:
    steps = rung.record.student_steps
    asked = given.get("num_inference_steps")
    if asked is not None and asked != steps:
        _warn(f"num_inference_steps={asked}: this LoRA is trained for {steps}")
    guidance = given.get("guidance_scale")
    if guidance is not None and guidance > 1:
        _warn(f"guidance_scale={guidance:g}: the LoRA has guidance in it already; 1.0 is right")
    expected = trained_timesteps(rung.scheduler, steps)
    found = _timesteps(pipeline, steps)
    if found != expected:
        _warn(
            f"{type(pipeline.scheduler).__name__} asks at timesteps {found}: this LoRA is trained at {expected}; "
            f"mend: call load_few_step again, or DDIMScheduler.from_pretrained(RUNG, subfolder='scheduler')"
        )
    kind = pipeline.scheduler.config.get("prediction_type")
    if kind != rung.record.prediction_type:
        _warn(
            f"the scheduler takes {kind!r} for what the U-Net predicts: this LoRA's is {rung.record.prediction_type!r}"
        )


def _timesteps(pipeline: DiffusionPipeline, steps: int) -> list[int] | str:
    scheduler = copy.deepcopy(pipeline.scheduler)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        return str(error)
    return [round(float(t)) for t in scheduler.timesteps]


def _warn(message: str) -> None:
    warnings.warn(message, FewStepWarning, stacklevel=3)
