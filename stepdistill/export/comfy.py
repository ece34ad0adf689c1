"""A rung's ComfyUI workflow: core nodes with the rung's sampling settings, as JSON to drag into ComfyUI's window.

e    unit noise
t    the conditioning timestep of the U-Net
s_t  sigma_t / alpha_t, the noise level in which ComfyUI's samplers step; their latents are ours divided by alpha_t, and the
     U-Net receives latents / sqrt(s_t^2 + 1)

A rung that starts at the last timestep: KSampler with euler and the scheduler "simple", which takes every (T / N)-th sigma
from the end. These are the trailing timesteps: exactly if N divides T, else off by at most one. It starts from
sqrt(s_t^2 + 1) e.
A one-step rung that starts from pure noise at an earlier t, which no KSampler can do:
  SDTurboScheduler          sigmas [s_t, 0]; its timesteps are 99, 199, .. 999, and SetFirstSigma sets any other
  AddNoise                  s_t e on the empty latent
  LatentMultiply            by sqrt(s_t^2 + 1) / s_t, so that the U-Net receives e
  SamplerCustomAdvanced     one euler step to 0, without adding noise
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.loading import load_schedule

SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
"""Name of each prediction_type in ModelSamplingDiscrete."""
_LARGEST_MULTIPLIER = 10.0  # the largest value that LatentMultiply accepts
_Slot = tuple[int, int, str]  # an output of a node: node's id, index of the output, type
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "LoraLoader": ("MODEL", "CLIP"),
    "LoraLoaderModelOnly": ("MODEL",),
    "ModelSamplingDiscrete": ("MODEL",),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "KSampler": ("LATENT",),
    "SDTurboScheduler": ("SIGMAS",),
    "SetFirstSigma": ("SIGMAS",),
    "RandomNoise": ("NOISE",),
    "DisableNoise": ("NOISE",),
    "AddNoise": ("LATENT",),
    "LatentMultiply": ("LATENT",),
    "BasicGuider": ("GUIDER",),
    "KSamplerSelect": ("SAMPLER",),
    "SamplerCustomAdvanced": ("LATENT", "LATENT"),
    "VAEDecode": ("IMAGE",),
    "SaveImage": (),
    "Note": (),
}
"""Output types of ComfyUI's core nodes; the outputs' names are the same, except for those in _OUTPUT_NAMES."""
_OUTPUT_NAMES = {"SamplerCustomAdvanced": ("output", "denoised_output")}


@dataclass(frozen=True)
class Start:
    """Node settings for a single step that starts at an earlier timestep than the last."""

    denoise: float
    """denoise of SDTurboScheduler."""
    first_sigma: float | None
    """sigma of SetFirstSigma; None if SDTurboScheduler has the timestep."""
    multiplier: float
    """multiplier of LatentMultiply."""


@dataclass(frozen=True)
class Setting:
    """ComfyUI's settings for a rung, besides LoRA strength 1, sampler euler and cfg 1."""

    steps: int
    sampling: str | None
    """sampling of ModelSamplingDiscrete; None if the checkpoint needs no such node."""
    zero_snr: bool
    start: Start | None
    """None if a KSampler can sample the rung."""


def setting_of(record: RungRecord, base: Mapping[str, Any]) -> Setting | None:
    """ComfyUI's settings for a rung; None if the teacher's noise schedule is not Stable Diffusion's, which ComfyUI uses.

    Args:
        record: record of the rung.
        base: the teacher's scheduler config.
    """
    noise_path, base_prediction = load_schedule(base)
    zero_snr = bool(base.get("rescale_betas_zero_snr"))
    theirs = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    comfys = VariancePreserving.from_betas(theirs, zero_terminal_snr=zero_snr).alphas_cumprod
    if comfys.shape != noise_path.alphas_cumprod.shape or not torch.allclose(
        comfys, noise_path.alphas_cumprod, atol=1e-6
    ):
        return None
    plain = record.prediction_type == base_prediction == "epsilon"
    sampling = None if plain else SAMPLING[record.prediction_type]
    first_timestep = noise_path.last_timestep if record.start_timestep is None else record.start_timestep
    start = None if first_timestep == noise_path.last_timestep else _start(first_timestep, noise_path)
    return Setting(record.student_steps, sampling, zero_snr, start)


def _start(timestep: int, noise_path: VariancePreserving) -> Start:
    alpha, sigma = (float(x) for x in noise_path.alpha_sigma(torch.tensor([timestep])))
    multiplier = round(1 / sigma, 4)  # sqrt(s_t^2 + 1) / s_t
    tenths, rest = divmod(timestep + 1, 100)
    if rest == 0:
        return Start(tenths / 10, None, multiplier)
    return Start(1.0, round(sigma / alpha, 6), multiplier)


def model_file_name(path: str) -> str:
    """A model's file name in ComfyUI's folders: the last part of the path, with .safetensors appended if it is missing."""
    name = Path(path).name
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def workflow_name(lora: str) -> str:
    """The workflow's file name: <name>_<N>step_comfyui.json for <name>_<N>step_lora.safetensors."""
    return f"{lora.removesuffix('_lora.safetensors')}_comfyui.json"


def workflow(
    setting: Setting,
    *,
    checkpoint: str,
    lora: str,
    teacher_loras: Sequence[tuple[str, float]],
    size: tuple[int, int],
    prompt: str,
    title: str,
) -> dict[str, Any]:
    """The workflow in the format that ComfyUI's editor saves (version 0.4).

    Args:
        setting: ComfyUI's settings for the rung.
        checkpoint: file name of the base model in models/checkpoints.
        lora: file name of the kohya file in models/loras.
        teacher_loras: file names and weights of the LoRAs that are part of the teacher.
        size: (height, width) of the image in pixels.
        prompt: the positive prompt.
        title: prefix of the saved images' names.
    """
    graph = _Graph()
    model, clip, vae = graph.add("CheckpointLoaderSimple", checkpoint)
    for name, weight in teacher_loras:
        model, clip = graph.add("LoraLoader", name, weight, weight, model=model, clip=clip)
    (model,) = graph.add("LoraLoaderModelOnly", lora, 1.0, model=model)
    if setting.sampling is not None:
        (model,) = graph.add("ModelSamplingDiscrete", setting.sampling, setting.zero_snr, model=model)
    (positive,) = graph.add("CLIPTextEncode", re.sub(r"([()])", r"\\\1", prompt), clip=clip)
    (latent,) = graph.add("EmptyLatentImage", size[1], size[0], 1)
    if setting.start is None:
        (negative,) = graph.add("CLIPTextEncode", "", clip=clip)
        samples = graph.add(
            "KSampler",
            *(0, "fixed", setting.steps, 1.0, "euler", "simple", 1.0),
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
        )[0]
    else:
        samples = _one_step(graph, setting.start, model, positive, latent)
    (image,) = graph.add("VAEDecode", samples=samples, vae=vae)
    graph.add("SaveImage", title, images=image)
    graph.add("Note", _note(checkpoint, lora, setting))
    return graph.as_json()


def _one_step(graph: "_Graph", start: Start, model: _Slot, positive: _Slot, latent: _Slot) -> _Slot:
    (sigmas,) = graph.add("SDTurboScheduler", 1, start.denoise, model=model)
    if start.first_sigma is not None:
        (sigmas,) = graph.add("SetFirstSigma", start.first_sigma, sigmas=sigmas)
    (noise,) = graph.add("RandomNoise", 0, "fixed")
    (noisy,) = graph.add("AddNoise", model=model, noise=noise, sigmas=sigmas, latent_image=latent)
    parts = math.ceil(math.log(start.multiplier, _LARGEST_MULTIPLIER)) if start.multiplier > 1 else 1
    for _ in range(parts):
        (noisy,) = graph.add("LatentMultiply", start.multiplier ** (1 / parts), samples=noisy)
    (none,) = graph.add("DisableNoise")
    (guider,) = graph.add("BasicGuider", model=model, conditioning=positive)
    (sampler,) = graph.add("KSamplerSelect", "euler")
    return graph.add(
        "SamplerCustomAdvanced",
        noise=none,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=noisy,
    )[0]


def _note(checkpoint: str, lora: str, setting: Setting) -> str:
    steps = "1 step" if setting.steps == 1 else f"{setting.steps} steps"
    return (
        f"models/checkpoints: the base model that was distilled, here {checkpoint}; choose your file in Load Checkpoint.\n"
        f"models/loras: {lora}, at strength 1.\n"
        f"The LoRA is trained for {steps} without guidance: other steps, schedulers and cfg give worse images. "
        f"A negative prompt has no effect at cfg 1."
    )


class _Graph:
    """The workflow's nodes in the order in which they run, and the links between them."""

    def __init__(self) -> None:
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._columns: list[int] = []

    def add(self, kind: str, *widgets: Any, **sources: _Slot) -> tuple[_Slot, ...]:
        """Adds a node and returns its outputs.

        Args:
            kind: the node's type.
            widgets: values of its widgets, in the node's order.
            sources: for each input the output that it is linked to, in the node's order.
        """
        number = len(self._nodes) + 1
        inputs = []
        for place, (name, (source, slot, kind_of_link)) in enumerate(sources.items()):
            link = len(self._links) + 1
            self._links.append([link, source, slot, number, place, kind_of_link])
            self._nodes[source - 1]["outputs"][slot]["links"].append(link)
            inputs.append({"name": name, "type": kind_of_link, "link": link})
        self._columns.append(
            1 + max((self._columns[source - 1] for source, _, _ in sources.values()), default=-1)
        )
        types = _OUTPUTS[kind]
        outputs = [
            {"name": name, "type": output_type, "links": [], "slot_index": slot}
            for slot, (name, output_type) in enumerate(
                zip(_OUTPUT_NAMES.get(kind, types), types, strict=True)
            )
        ]
        self._nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [400 * self._columns[-1], 240 * (self._columns.count(self._columns[-1]) - 1)],
                "size": [340, 180],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": outputs,
                "properties": {"Node name for S&R": kind},
                "widgets_values": list(widgets),
            }
        )
        return tuple((number, slot, output_type) for slot, output_type in enumerate(types))

    def as_json(self) -> dict[str, Any]:
        """The workflow as ComfyUI's editor saves it."""
        return {
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }
