"""The checks of load_few_step: errors if images would be nonsense, warnings if the settings differ from the training."""

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
from diffusers import DiffusionPipeline

from stepdistill.export.scheduler import StudentScheduler, step_options, trained_timesteps
from stepdistill.models.adapters import lora_layers
from stepdistill.models.identity import BaseIdentity, identity_of, layer_shapes, uncompiled
from stepdistill.models.lora_file import Lora, check_fits
from stepdistill.models.network.kind import kind_of
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.fingerprints import TEXT_ENCODERS

ADAPTER = "few_step"
"""The adapter's name in the pipeline, for set_adapters together with other LoRAs."""
LOADED = "_few_step_rung"
"""Attribute of a U-Net: sha256 of the loaded rung's LoRA. All pipelines that share the U-Net see it."""
_SAME_STEP = ("DDIMScheduler", "EulerDiscreteScheduler")
"""Deterministic first-order schedulers: at equal timesteps they give the same image."""
_NOISE_TOLERANCE = 0.01
"""Allowed difference from 1 of a scheduler's scale of the initial noise; Euler's scale is .9977 at timestep 999."""


class FewStepWarning(UserWarning):
    """The pipeline works, but it is not used as the LoRA was trained."""


@dataclass(frozen=True)
class LoadedRung:
    """A rung read from disk: its record, weights file, scheduler, and the base it belongs to (None if not stored)."""

    record: RungRecord
    weights: Path
    scheduler: StudentScheduler
    base: BaseIdentity | None


def network_of(pipeline: DiffusionPipeline) -> Any:
    """The pipeline's U-Net or transformer without torch.compile's wrapper; ValueError if the pipeline has neither."""
    network = getattr(pipeline, "unet", None)
    if network is None:  # not `or`: a compiled module has no truth value
        network = getattr(pipeline, "transformer", None)
    if network is None:
        raise ValueError(
            f"a {type(pipeline).__name__} has no such network; allowed: pipelines of SD1.5, SD2.x, SDXL, SD3 and Z-Image"
        )
    return uncompiled(network)


def call_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a call that the pipeline's text encoders ask for; none for pipelines of U-Nets."""
    return kind_of(network_of(pipeline)).call_options(pipeline)


def no_guidance(pipeline: DiffusionPipeline) -> float:
    """The `guidance_scale` at which the pipeline's call takes one pass a step."""
    return kind_of(network_of(pipeline)).pipeline_guidance(1.0)


def check_pipeline(pipeline: DiffusionPipeline, rung: LoadedRung, lora: Lora) -> None:
    """ValueError if the LoRA is of another U-Net or a LoRA is merged already; a warning if the base has other weights, or
    its weights cannot be compared."""
    unet = network_of(pipeline)
    check_fits(lora, layer_shapes(unet), name=str(rung.weights))
    if getattr(pipeline, "num_fused_loras", 0) or any(layer.merged for layer in lora_layers(unet)):
        raise ValueError(
            "the pipeline has a LoRA merged into its weights, and this one would be added on top; fix: call "
            "pipeline.unfuse_lora() and unload_lora_weights() first, or load a fresh pipeline"
        )
    identity = identity_of(unet)
    if rung.base is not None and rung.base.tensors != identity.tensors:
        raise ValueError(
            f"{rung.weights} is a LoRA of another network: that one has {rung.base.tensors} tensors, "
            f"this one {identity.tensors}"
        )
    same = None if rung.base is None else rung.base.same_weights(identity)
    if same is None:
        _warn(
            f"whether {rung.weights} was trained on this base could not be checked: the pipeline's weights are quantised or "
            f"offloaded, or the rung has no base.json; it was trained on the base with fingerprint "
            f"{rung.record.base_fingerprint}"
        )
    elif not same:
        _warn(
            f"{rung.weights} was trained on another base (fingerprint {rung.record.base_fingerprint}): the shapes match, "
            f"but the weights differ; images may be worse than in the run's report"
        )


def check_dtypes(pipeline: DiffusionPipeline) -> None:
    """A warning if a text encoder and the U-Net have different dtypes, since every call of the pipeline then fails. Without
    `dtype`, from_pretrained keeps a float16 text encoder as it is and loads the U-Net in float32."""
    unet_dtype = network_of(pipeline).dtype
    for name in TEXT_ENCODERS:
        dtype = getattr(getattr(pipeline, name, None), "dtype", unet_dtype)
        if dtype != unet_dtype and dtype.is_floating_point and unet_dtype.is_floating_point:
            _warn(
                f"the pipeline's {name} is {dtype} and its network {unet_dtype}, so calling it will fail; fix: "
                f"from_pretrained(..., dtype={unet_dtype}), or pipeline.to({unet_dtype})"
            )


def check_saved(pipeline: DiffusionPipeline) -> None:
    """ValueError if the U-Net has unmerged LoRAs: diffusers saves such layers under names that from_pretrained does not
    read, and on loading fills the layers with random numbers."""
    names = dict.fromkeys(name for layer in lora_layers(network_of(pipeline)) for name in layer.scaling)
    if names:
        raise ValueError(
            f"save_pretrained: the network has LoRAs beside its weights ({', '.join(names)}), and diffusers cannot load "
            f"what it saves of such a network; fix: pipeline.fuse_lora() and then pipeline.unload_lora_weights() to save it "
            f"with the LoRAs merged, or unload_lora_weights() alone to save the base"
        )


def check_call(pipeline: DiffusionPipeline, rung: LoadedRung, given: Mapping[str, Any]) -> None:
    """Warnings about a call's arguments and the pipeline's state; ValueError if `strength` would leave no step.

    given: the call's arguments by name.
    """
    steps = rung.record.student_steps
    given_steps, guidance, strength = (
        given.get(name) for name in ("num_inference_steps", "guidance_scale", "strength")
    )
    if strength is not None and int((given_steps or steps) * strength) < 1:
        raise ValueError(
            f"strength={strength:g} leaves no step of {given_steps or steps}; allowed: {1 / (given_steps or steps):g} and "
            f"more, or a rung of more steps"
        )
    if given_steps is not None and given_steps != steps:
        _warn(f"num_inference_steps={given_steps}: this LoRA is trained for {steps}")
    if guidance is not None and guidance > (off := no_guidance(pipeline)):
        _warn(f"guidance_scale={guidance:g}: guidance is already distilled into the LoRA; use {off}")
    size = rung.record.image_size and tuple(rung.record.image_size)
    if size and (asked := (given.get("height") or size[0], given.get("width") or size[1])) != size:
        _warn(
            f"height={asked[0]}, width={asked[1]}: this LoRA is trained at height {size[0]} and width {size[1]}"
        )
    if given.get("eta"):
        _warn(f"eta={given['eta']:g} adds noise that the LoRA was not trained with; use 0.0")
    mismatches = [*_scheduler_mismatches(pipeline, rung), *_adapter_mismatches(pipeline, rung)]
    if mismatches:
        _warn(f"{'; '.join(mismatches)}; fix: call load_few_step again")


def _scheduler_mismatches(pipeline: DiffusionPipeline, rung: LoadedRung) -> list[str]:
    """How the pipeline's scheduler differs from the rung's, one text for each difference."""
    scheduler, steps = pipeline.scheduler, rung.record.student_steps
    name, config = type(scheduler).__name__, scheduler.config
    if step_options(rung.scheduler, steps):
        return _flow_mismatches(scheduler, rung.scheduler)
    if name not in _SAME_STEP:
        return [f"{name} takes other steps than the LoRA was trained for; allowed: {' or '.join(_SAME_STEP)}"]
    mismatches = []
    expected, used = trained_timesteps(rung.scheduler, steps), _timesteps(scheduler, steps)
    if used != expected:
        mismatches.append(f"{name} uses timesteps {used}, this LoRA is trained at {expected}")
    if config.get("prediction_type") != rung.record.prediction_type:
        mismatches.append(
            f"the scheduler has prediction_type={config.get('prediction_type')!r}, this LoRA needs "
            f"{rung.record.prediction_type!r}"
        )
    share = _noise_share(scheduler, steps)
    if abs(share - 1) > _NOISE_TOLERANCE:
        mismatches.append(
            f"{name} begins with the noise scaled by {share:.2f}, this LoRA is trained with unscaled noise; "
            f"allowed: DDIMScheduler"
        )
    ours, theirs = rung.scheduler.alphas_cumprod, scheduler.alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), atol=1e-6):
        mismatches.append("the scheduler has another noise schedule than the LoRA was trained with")
    clips = [key for key in ("clip_sample", "thresholding") if config.get(key)]
    mismatches += [f"the scheduler has {key}=True, which clips the latents" for key in clips]
    if name == "DDIMScheduler" and not config.get("set_alpha_to_one"):
        mismatches.append("the scheduler has set_alpha_to_one=False, which leaves noise after the last step")
    return mismatches


def _flow_mismatches(scheduler: Any, trained: StudentScheduler) -> list[str]:
    """How a pipeline's scheduler differs from that of a flow on which the rung was trained."""
    name, expected = type(scheduler).__name__, type(trained).__name__
    if name != expected:
        return [f"{name} takes other steps than the LoRA was trained for; allowed: {expected}"]
    odd = [
        key for key, value in trained.config.items() if key[0] != "_" and scheduler.config.get(key) != value
    ]
    return [f"the scheduler has {key}={scheduler.config.get(key)}, not {trained.config[key]}" for key in odd]


def _timesteps(scheduler: Any, steps: int) -> list[int] | str:
    """The timesteps that a scheduler uses for so many steps, or its error message if it has too few timesteps."""
    scheduler_copy = copy.deepcopy(scheduler)
    try:
        scheduler_copy.set_timesteps(steps)
    except ValueError as error:
        return str(error)
    return [round(float(t)) for t in scheduler_copy.timesteps]


def _noise_share(scheduler: Any, steps: int) -> float:
    """Factor by which the initial unit noise is scaled in the first U-Net call of text-to-image sampling: 1 for DDIM; for
    Euler on trailing timesteps sigma / sqrt(sigma^2 + 1), which is .76 at timestep 399 of Stable Diffusion's schedule."""
    copied = copy.deepcopy(scheduler)
    with contextlib.suppress(ValueError):  # more steps than the schedule has timesteps; _timesteps reports it
        copied.set_timesteps(steps)
    scale = float(copied.init_noise_sigma)
    sigmas = getattr(copied, "sigmas", None)
    return scale if sigmas is None else scale / math.sqrt(float(sigmas[0]) ** 2 + 1)


def _adapter_mismatches(pipeline: DiffusionPipeline, rung: LoadedRung) -> list[str]:
    """What is wrong with the few-step LoRA on the U-Net: replaced by another rung, unloaded, inactive, or not at weight 1.
    Nothing is wrong if it is merged."""
    unet = network_of(pipeline)
    if vars(unet).get(LOADED) != rung.record.sha256:
        return ["another rung was loaded onto this network by another pipeline"]
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
    """Warns at the line of the user's code: Python shows a warning once per line, so a call elsewhere warns again."""
    here, frame, depth = str(Path(__file__).parents[1]), inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(here):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, FewStepWarning, stacklevel=depth)
