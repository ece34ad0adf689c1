"""ComfyUI's core nodes after their public description: inputs and outputs of each, and the formulas of the samplers.

A workflow is checked against the nodes' declared slots and then run on a tiny pipeline. Samples inside a sampler are
diffusers' samples divided by alpha_t, with sigma = sigma_t / alpha_t over 1000 timesteps of Stable Diffusion's betas.
Outside samplers, latents are divided by the VAE's factor.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepdistill.models.network.kind import load_network
from tests.integration.kohya_reader import merged
from tests.original_layout import unet_name

# Per node: inputs by links in order, widgets in order, outputs. "control" is the frontend's after-generate widget.
NODES = {
    "CheckpointLoaderSimple": ([], ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "LoraLoader": (
        [("model", "MODEL"), ("clip", "CLIP")],
        ["lora_name", "strength_model", "strength_clip"],
        ["MODEL", "CLIP"],
    ),
    "LoraLoaderModelOnly": ([("model", "MODEL")], ["lora_name", "strength_model"], ["MODEL"]),
    "ModelSamplingDiscrete": ([("model", "MODEL")], ["sampling", "zsnr"], ["MODEL"]),
    "CLIPTextEncode": ([("clip", "CLIP")], ["text"], ["CONDITIONING"]),
    "EmptyLatentImage": ([], ["width", "height", "batch_size"], ["LATENT"]),
    "KSampler": (
        [
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ],
        ["seed", "control", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        ["LATENT"],
    ),
    "SDTurboScheduler": ([("model", "MODEL")], ["steps", "denoise"], ["SIGMAS"]),
    "SetFirstSigma": ([("sigmas", "SIGMAS")], ["sigma"], ["SIGMAS"]),
    "RandomNoise": ([], ["noise_seed", "control"], ["NOISE"]),
    "DisableNoise": ([], [], ["NOISE"]),
    "AddNoise": (
        [("model", "MODEL"), ("noise", "NOISE"), ("sigmas", "SIGMAS"), ("latent_image", "LATENT")],
        [],
        ["LATENT"],
    ),
    "LatentMultiply": ([("samples", "LATENT")], ["multiplier"], ["LATENT"]),
    "BasicGuider": ([("model", "MODEL"), ("conditioning", "CONDITIONING")], [], ["GUIDER"]),
    "KSamplerSelect": ([], ["sampler_name"], ["SAMPLER"]),
    "SamplerCustomAdvanced": (
        [
            ("noise", "NOISE"),
            ("guider", "GUIDER"),
            ("sampler", "SAMPLER"),
            ("sigmas", "SIGMAS"),
            ("latent_image", "LATENT"),
        ],
        [],
        ["LATENT", "LATENT"],
    ),
    "VAEDecode": ([("samples", "LATENT"), ("vae", "VAE")], [], ["IMAGE"]),
    "SaveImage": ([("images", "IMAGE")], ["filename_prefix"], []),
    "Note": ([], ["text"], []),
}
RANGES = {
    "strength_model": (-100, 100),
    "width": (16, 16384),
    "height": (16, 16384),
    "steps": (1, 10000),
    "cfg": (0, 100),
    "denoise": (0, 1),
    "sigma": (0, 20000),
    "multiplier": (-10, 10),
}


def check_structure(workflow):
    """AssertionError if a node, slot, link, type or widget differs from what the nodes declare."""
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) == workflow["last_link_id"]
    places = [tuple(node["pos"]) for node in nodes.values()]
    assert len(set(places)) == len(places)
    for node in nodes.values():
        inputs, widgets, outputs = NODES[node["type"]]
        assert [(i["name"], i["type"]) for i in node["inputs"]] == inputs, node["type"]
        assert [o["type"] for o in node["outputs"]] == outputs, node["type"]
        assert len(node["widgets_values"]) == len(widgets), node["type"]
        for name, value in zip(widgets, node["widgets_values"], strict=True):
            low, high = RANGES.get(name, (-math.inf, math.inf))
            assert isinstance(value, str) or low <= value <= high, (node["type"], name, value)
        for place, entry in enumerate(node["inputs"]):
            _, source, slot, target, target_slot, kind = links[entry["link"]]
            assert (target, target_slot, kind) == (node["id"], place, entry["type"])
            output = nodes[source]["outputs"][slot]
            assert output["type"] == kind
            assert entry["link"] in output["links"]
            assert nodes[source]["order"] < node["order"]
        for slot, output in enumerate(node["outputs"]):
            assert all(links[number][1:3] == [node["id"], slot] for number in output["links"])


@dataclass(frozen=True)
class Model:
    """A U-Net with the settings that ComfyUI's sampling uses."""

    unet: Any
    factor: float
    sampling: str = "eps"
    zsnr: bool = False

    @property
    def sigmas(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bars = torch.cumprod(1 - betas, dim=0)
        if self.zsnr:
            root = bars.sqrt()
            bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            bars[-1] = 4.8973451890853435e-08
        return ((1 - bars) / bars).sqrt().float()

    def scaled_noise(self, sigma, noise, latent, *, most=False):
        return noise * ((1 + sigma**2) ** 0.5 if most else sigma) + latent

    @torch.no_grad()
    def denoised(self, x, sigma, conditioning):
        timestep = (sigma.log() - self.sigmas.log()).abs().argmin()
        scaled = x / (sigma**2 + 1) ** 0.5
        height, width = (8 * side for side in x.shape[2:])
        added = None
        if "pooled" in conditioning:
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            added = {"text_embeds": conditioning["pooled"], "time_ids": ids}
        out = self.unet(scaled, timestep, conditioning["embeds"], added_cond_kwargs=added, return_dict=False)[
            0
        ]
        if self.sampling == "eps":
            return x - sigma * out
        if self.sampling == "v_prediction":
            return x / (sigma**2 + 1) - out * sigma / (sigma**2 + 1) ** 0.5
        assert self.sampling == "x0"
        return out

    def sampled(self, noise, latent, sigmas, conditioning):
        """Euler without churn, from noise added to a latent; both are given as they are outside a sampler."""
        if latent.count_nonzero():
            latent = latent * self.factor
        most = sigmas[0] > self.sigmas[-1] or math.isclose(sigmas[0], self.sigmas[-1], rel_tol=1e-5)
        x = self.scaled_noise(sigmas[0], noise, latent, most=most)
        for sigma, following in itertools.pairwise(sigmas):
            slope = (x - self.denoised(x, sigma, conditioning)) / sigma
            x = x + slope * (following - sigma)
        return x / self.factor


def random_noise(seed, latent):
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def with_lora(model, file):
    """A copy of the model with kohya's file merged into its U-Net, by the file's spelling of the names."""
    unet = load_network(file.parents[3].parent / "teacher")
    unet.load_state_dict(model.unet.state_dict())
    weights = {key: w.detach() for key, w in unet.named_parameters()}
    attended = {key.split(".")[1] for key in weights if key.startswith("up_blocks") and "attentions" in key}
    sgm = unet.config.addition_embed_type == "text_time"
    spelt = {key: unet_name(key, attended) if sgm else key for key in weights}
    merged_weights = merged(file, {spelt[key]: w for key, w in weights.items()})
    unet.load_state_dict({key: merged_weights[spelt[key]] for key in weights})
    return replace(model, unet=unet)


def encoded(pipeline, text):
    text = text.replace("\\(", "(").replace("\\)", ")")
    if hasattr(pipeline, "text_encoder_2"):
        embeds, _, pooled, _ = pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
        return {"embeds": embeds, "pooled": pooled}
    return {"embeds": pipeline.encode_prompt(text, "cpu", 1, False)[0]}


def run(workflow, pipeline, loras):
    """The input of the node VAEDecode, as the pipeline's latents (B, C, h, w).

    Args:
        workflow: a workflow that check_structure accepts.
        pipeline: the base, without LoRA.
        loras: the folder of kohya's files.
    """
    values, decoded = {}, None
    sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    for node in sorted(workflow["nodes"], key=lambda n: n["order"]):
        kind, (_, names, _) = node["type"], NODES[node["type"]]
        w = dict(zip(names, node["widgets_values"], strict=True))
        i = {entry["name"]: values[sources[entry["link"]]] for entry in node["inputs"]}
        if kind == "VAEDecode":
            decoded = i["samples"] * pipeline.vae.config.scaling_factor
        for slot, value in enumerate(_outputs(kind, w, i, pipeline, loras)):
            values[node["id"], slot] = value
    return decoded


def _outputs(kind, w, i, pipeline, loras):
    match kind:
        case "CheckpointLoaderSimple":
            return Model(pipeline.unet, pipeline.vae.config.scaling_factor), pipeline, pipeline.vae
        case "LoraLoaderModelOnly":
            assert w["strength_model"] == 1.0
            return (with_lora(i["model"], loras / w["lora_name"]),)
        case "ModelSamplingDiscrete":
            return (replace(i["model"], sampling=w["sampling"], zsnr=w["zsnr"]),)
        case "CLIPTextEncode":
            return (encoded(i["clip"], w["text"]),)
        case "EmptyLatentImage":
            return (torch.zeros(w["batch_size"], 4, w["height"] // 8, w["width"] // 8),)
        case "KSampler":
            assert (w["cfg"], w["denoise"]) == (1.0, 1.0)
            assert (w["sampler_name"], w["scheduler"]) == ("euler", "simple")
            model, noise = i["model"], random_noise(w["seed"], i["latent_image"])
            sigmas = simple(model.sigmas, w["steps"])
            return (model.sampled(noise, i["latent_image"], sigmas, i["positive"]),)
        case "SDTurboScheduler":
            first = 10 - int(10 * w["denoise"])
            timesteps = [999 - 100 * k for k in range(10)][first : first + w["steps"]]
            return (torch.cat([i["model"].sigmas[timesteps], torch.zeros(1)]),)
        case "SetFirstSigma":
            return (torch.cat([torch.tensor([w["sigma"]]), i["sigmas"][1:]]),)
        case "RandomNoise":
            return (lambda latent: random_noise(w["noise_seed"], latent),)
        case "DisableNoise":
            return (torch.zeros_like,)
        case "AddNoise":
            assert not i["latent_image"].count_nonzero()
            scale = (i["sigmas"][0] - i["sigmas"][-1]).abs()
            noise = i["noise"](i["latent_image"])
            return (i["model"].scaled_noise(scale, noise, i["latent_image"]) / i["model"].factor,)
        case "LatentMultiply":
            return (i["samples"] * w["multiplier"],)
        case "BasicGuider":
            return ((i["model"], i["conditioning"]),)
        case "KSamplerSelect":
            assert w["sampler_name"] == "euler"
            return ("euler",)
        case "SamplerCustomAdvanced":
            model, conditioning = i["guider"]
            noise = i["noise"](i["latent_image"])
            samples = model.sampled(noise, i["latent_image"], i["sigmas"], conditioning)
            return samples, samples
    return (None,)


def simple(sigmas, steps):
    """The sigmas of ComfyUI's scheduler "simple": every T / N-th from the end."""
    chosen = [sigmas[-(1 + int(k * len(sigmas) / steps))] for k in range(steps)]
    return torch.cat([torch.stack(chosen), torch.zeros(1)])
