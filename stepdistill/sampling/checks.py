"""What load_few_step looks at: refused where the picture would be nonsense, warned of where it is not what was trained."""

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from stepdistill.export.scheduler import trained_timesteps
from stepdistill.models.adapters import lora_layers
from stepdistill.models.identity import BaseIdentity, identity_of, layer_shapes
from stepdistill.models.lora_file import Lora, check_fits
from stepdistill.run.rungs import RungRecord

ADAPTER = "few_step"
"""The adapter's name in the pipeline: for set_adapters beside a style's."""
LOADED = "_few_step_rung"
"""Of a U-Net: sha256 of the rung whose LoRA it carries, also where several pipelines share it."""
_SAME_STEP = ("DDIMScheduler", "EulerDiscreteScheduler")
"""Deterministic, first order: at equal timesteps they draw one picture."""
_NOISE_TOLERANCE = 0.01
"""How far from 1 a scheduler may scale the noise that it begins with; Euler scales it by .9977 at timestep 999."""


class FewStepWarning(UserWarning):
    """The pipeline draws, but not as the LoRA was trained."""


@dataclass(frozen=True)
class LoadedRung:
    """A rung as its file says: what it is, where, how it is sampled, and the base that it belongs to."""

    record: RungRecord
    weights: Path
    scheduler: DDIMScheduler
    base: BaseIdentity | None


def unet_of(pipeline: DiffusionPipeline) -> UNet2DConditionModel:
    """The pipeline's U-Net, out of what torch.compile wraps it in; ValueError where it has none."""
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ValueError(
            f"a {type(pipeline).__name__} has no U-Net; allowed: pipelines of SD1.5, SD2.x and SDXL"
        )
    return getattr(unet, "_orig_mod", unet)


def check_base(pipeline: DiffusionPipeline, rung: LoadedRung, lora: Lora) -> None:
    """ValueError where the LoRA is another U-Net's or one is merged already; a warning where the base has other weights."""
    unet = unet_of(pipeline)
    check_fits(lora, layer_shapes(unet), name=str(rung.weights))
    if getattr(pipeline, "num_fused_loras", 0) or any(layer.merged for layer in lora_layers(unet)):
        raise ValueError(
            "the pipeline has a LoRA merged into its weights, and another would be added to it; mend: "
            "pipeline.unfuse_lora() and unload_lora_weights() first, or a fresh pipeline"
        )
    identity = identity_of(unet)
    if rung.base is not None and rung.base.tensors != identity.tensors:
        raise ValueError(
            f"{rung.weights} is a LoRA of another U-Net: that one has {rung.base.tensors} tensors, "
            f"this one {identity.tensors}"
        )
    same = None if rung.base is None else rung.base.same_weights(identity)
    if same is None:
        _warn(
            f"whether {rung.weights} was trained on this base could not be checked: its weights are quantised or "
            f"elsewhere, or the rung has no base.json; its fingerprint is {rung.record.base_fingerprint}"
        )
    elif not same:
        _warn(
            f"{rung.weights} was trained on another base (fingerprint {rung.record.base_fingerprint}): shapes fit, weights "
            f"differ; pictures may be worse than the report says"
        )


def check_dtypes(pipeline: DiffusionPipeline) -> None:
    """A warning where a text encoder and the U-Net have different dtypes, at which every call stops: without `dtype`
    from_pretrained reads a float16 text encoder as it is and the U-Net as float32."""
    unet_dtype = unet_of(pipeline).dtype
    for name in ("text_encoder", "text_encoder_2"):
        dtype = getattr(getattr(pipeline, name, None), "dtype", unet_dtype)
        if dtype != unet_dtype and dtype.is_floating_point and unet_dtype.is_floating_point:
            _warn(
                f"the pipeline's {name} is {dtype} and its U-Net {unet_dtype}, at which a call stops; mend: "
                f"from_pretrained(..., dtype={unet_dtype}), or pipeline.to({unet_dtype})"
            )


def check_saved(pipeline: DiffusionPipeline) -> None:
    """ValueError where the U-Net has LoRAs beside its weights: diffusers saves such a layer under names that from_pretrained
    does not read, and fills it with random numbers."""
    names = dict.fromkeys(name for layer in lora_layers(unet_of(pipeline)) for name in layer.scaling)
    if names:
        raise ValueError(
            f"save_pretrained: the U-Net has LoRAs beside its weights ({', '.join(names)}), and diffusers does not load "
            f"again what it saves of that; mend: pipeline.fuse_lora() and then pipeline.unload_lora_weights(), which leaves "
            f"them in the weights, or unload_lora_weights() alone for the base"
        )


def check_call(pipeline: DiffusionPipeline, rung: LoadedRung, given: Mapping[str, Any]) -> None:
    """Warnings about a call's arguments and the pipeline's state; ValueError where no step would be left."""
    steps = rung.record.student_steps
    asked, guidance, strength = (
        given.get(name) for name in ("num_inference_steps", "guidance_scale", "strength")
    )
    if strength is not None and int((asked or steps) * strength) < 1:
        raise ValueError(
            f"strength={strength:g} leaves no step of {asked or steps}; allowed: {1 / (asked or steps):g} and more, "
            f"or a rung of more steps"
        )
    if asked is not None and asked != steps:
        _warn(f"num_inference_steps={asked}: this LoRA is trained for {steps}")
    if guidance is not None and guidance > 1:
        _warn(f"guidance_scale={guidance:g}: the LoRA has guidance in it already; 1.0 is right")
    if given.get("eta"):
        _warn(f"eta={given['eta']:g} adds noise that the LoRA was not trained with; 0.0 is right")
    wrong = [*_of_scheduler(pipeline, rung), *_of_adapter(pipeline, rung)]
    if wrong:
        _warn(f"{'; '.join(wrong)}; mend: call load_few_step again")


def _of_scheduler(pipeline: DiffusionPipeline, rung: LoadedRung) -> list[str]:
    scheduler, steps = pipeline.scheduler, rung.record.student_steps
    name, config = type(scheduler).__name__, scheduler.config
    if name not in _SAME_STEP:
        return [f"{name} does not step as the LoRA was trained; allowed: {' or '.join(_SAME_STEP)}"]
    wrong = []
    expected, found = trained_timesteps(rung.scheduler, steps), _timesteps(scheduler, steps)
    if found != expected:
        wrong.append(f"{name} asks at timesteps {found}, this LoRA is trained at {expected}")
    if config.get("prediction_type") != rung.record.prediction_type:
        wrong.append(
            f"the scheduler takes {config.get('prediction_type')!r} for what the U-Net predicts, this LoRA's is "
            f"{rung.record.prediction_type!r}"
        )
    share = _noise_share(scheduler, steps)
    if abs(share - 1) > _NOISE_TOLERANCE:
        wrong.append(
            f"{name} begins with the noise scaled by {share:.2f}, this LoRA is trained with the noise as it is; "
            f"allowed: DDIMScheduler"
        )
    ours, theirs = rung.scheduler.alphas_cumprod, scheduler.alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), atol=1e-6):
        wrong.append("the scheduler has another noise schedule")
    clips = [key for key in ("clip_sample", "thresholding") if config.get(key)]
    wrong += [f"the scheduler has {key}=True, which cuts latents" for key in clips]
    if name == "DDIMScheduler" and not config.get("set_alpha_to_one"):
        wrong.append("the scheduler has set_alpha_to_one=False, which leaves noise in the last step")
    return wrong


def _timesteps(scheduler: Any, steps: int) -> list[int] | str:
    scheduler_copy = copy.deepcopy(scheduler)
    try:
        scheduler_copy.set_timesteps(steps)
    except ValueError as error:
        return str(error)
    return [round(float(t)) for t in scheduler_copy.timesteps]


def _noise_share(scheduler: Any, steps: int) -> float:
    """What the first U-Net call of a text-to-image sampling sees of unit noise: 1 for DDIM, sigma / sqrt(sigma^2 + 1) for
    Euler on trailing timesteps, which is .76 at timestep 399 of Stable Diffusion's schedule."""
    copied = copy.deepcopy(scheduler)
    with contextlib.suppress(ValueError):  # more steps than the schedule has timesteps, which _timesteps says
        copied.set_timesteps(steps)
    scale = float(copied.init_noise_sigma)
    sigmas = getattr(copied, "sigmas", None)
    return scale if sigmas is None else scale / math.sqrt(float(sigmas[0]) ** 2 + 1)


def _of_adapter(pipeline: DiffusionPipeline, rung: LoadedRung) -> list[str]:
    """Whether the LoRA is there, active, whole, and this pipeline's own; or merged."""
    unet = unet_of(pipeline)
    if vars(unet).get(LOADED) != rung.record.sha256:
        return ["another rung was loaded onto this U-Net by another pipeline"]
    layers = [layer for layer in lora_layers(unet) if ADAPTER in layer.scaling]
    if not layers:
        merged = ADAPTER in getattr(pipeline, "fused_loras", ())
        return [] if merged else ["the few-step LoRA was unloaded"]
    if any(ADAPTER in layer.merged_adapters for layer in layers):
        return []
    if any(layer.disable_adapters or ADAPTER not in layer.active_adapters for layer in layers):
        return [
            f"the few-step LoRA is not active: set_adapters leaves {ADAPTER!r} out, or a later LoRA took its place"
        ]
    scales = {
        round(layer.scaling[ADAPTER] * layer.r[ADAPTER] / layer.lora_alpha[ADAPTER], 6) for layer in layers
    }
    if scales != {1.0}:
        return [f"the few-step LoRA has weight {', '.join(f'{s:g}' for s in sorted(scales))}, not 1"]
    return []


def _warn(message: str) -> None:
    """At the user's own line, so that another call warns again: Python shows a line's warning once."""
    here, frame, depth = str(Path(__file__).parents[1]), inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(here):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, FewStepWarning, stacklevel=depth)
