"""A rung together with ControlNet, a style LoRA or an IP-Adapter in text to image, image to image and inpainting.

From one noise, the base, the rung, and the rung with the extra must give three different outputs, and each extra must give
the same output whether the rung is merged into the weights or loaded as an adapter.
"""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)

from stepdistill.export.rung import export_rung
from stepdistill.models.lora_file import read_lora
from stepdistill.sampling import load_few_step
from tests.integration.exported import rung_of, write_rung

TASKS = ("text2img", "img2img", "inpaint")
WITH_CONTROL = {
    ("sd15", "text2img"): StableDiffusionControlNetPipeline,
    ("sd15", "img2img"): StableDiffusionControlNetImg2ImgPipeline,
    ("sd15", "inpaint"): StableDiffusionControlNetInpaintPipeline,
    ("sdxl", "text2img"): StableDiffusionXLControlNetPipeline,
    ("sdxl", "img2img"): StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", "inpaint"): StableDiffusionXLControlNetInpaintPipeline,
}
PLAIN = {"img2img": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
SIDE = 64


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def rung(request, tmp_path_factory):
    """(family, teacher's folder, exported 4-step rung, a style LoRA's folder)."""
    config, teacher, _ = rung_of(tmp_path_factory.mktemp(request.param), request.param)
    write_rung(config, teacher, 8, seed=6)
    return request.param, teacher, export_rung(config, 4), config.run_dir / "rungs" / "8"


def image(seed):
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def inputs_of(task):
    if task == "text2img":
        return {"height": SIDE, "width": SIDE}
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    more = {"mask_image": mask, "height": SIDE, "width": SIDE} if task == "inpaint" else {}
    return {"image": image(1), "strength": 0.75, **more}


def draw(pipeline, task, **options):
    """Latents at the rung's number of steps, given explicitly instead of by the pipeline's defaults."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(
            "a red letter a",
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **inputs_of(task),
            **options,
        ).images


def bare(teacher, scheduler):
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.scheduler = scheduler
    return pipeline


def merged(teacher, scheduler, *loras):
    """The base with LoRAs added to its weights without peft."""
    pipeline = bare(teacher, scheduler)
    for path, weight in loras:
        for name, layer in read_lora(path).layers.items():
            pipeline.unet.get_submodule(name).weight.data += weight * layer.delta()
    return pipeline


def for_task(pipeline, task):
    return pipeline if task == "text2img" else PLAIN[task].from_pipe(pipeline)


def all_differ(*outputs):
    size = max(float(output.abs().max()) for output in outputs)
    return all(
        float((a - b).abs().max()) > 1e-3 * size for i, a in enumerate(outputs) for b in outputs[i + 1 :]
    )


def equal(a, b):
    return float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


@pytest.mark.parametrize("task", ["text2img", *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS[1:])])
def test_a_style_lora_and_a_controlnet_work_together_with_the_rung(rung, task):
    family, teacher, folder, style = rung
    few = DiffusionPipeline.from_pretrained(teacher)
    load_few_step(few, folder)
    scheduler = few.scheduler
    undistilled = draw(for_task(bare(teacher, scheduler), task), task)
    plain = draw(for_task(few, task), task)

    few.load_lora_weights(style, adapter_name="style")
    few.set_adapters(["few_step", "style"], [1.0, 0.6])
    styled = draw(for_task(few, task), task)
    assert all_differ(undistilled, plain, styled)
    expected = merged(teacher, scheduler, (folder, 1.0), (style, 0.6))
    assert equal(styled, draw(for_task(expected, task), task))

    controlnet = control_of(few.unet, family)
    options = controlled(task)
    with_control = WITH_CONTROL[family, task].from_pipe(few, controlnet=controlnet)
    both = draw(with_control, task, **options)
    assert all_differ(undistilled, plain, styled, both)
    with_control = WITH_CONTROL[family, task].from_pipe(expected, controlnet=controlnet)
    assert equal(both, draw(with_control, task, **options))


def control_of(unet, family):
    """A ControlNet of the base's shapes whose zero convolutions have random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 8, 16, 16), load_weights_from_unet=False
        )
    for name, parameter in controlnet.named_parameters():
        if "controlnet" in name or "conv_out" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return controlnet.eval()


def controlled(task):
    """The control image as call options: `image` in text to image, otherwise `control_image`."""
    return {"image" if task == "text2img" else "control_image": image(2)}


def test_an_ip_adapter_works_together_with_the_rung(rung):
    _, teacher, folder, _ = rung
    few = DiffusionPipeline.from_pretrained(teacher)
    load_few_step(few, folder)
    plain, undistilled = draw(few, "text2img"), draw(bare(teacher, few.scheduler), "text2img")
    expected = merged(teacher, few.scheduler, (folder, 1.0))
    embeds = [torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3))]
    outputs = []
    for pipeline in (few, expected):
        pipeline.unet._load_ip_adapter_weights([ip_adapter(pipeline.unet)])
        pipeline.set_ip_adapter_scale(1.0)
        outputs.append(draw(pipeline, "text2img", ip_adapter_image_embeds=embeds))
    assert all_differ(undistilled, plain, outputs[0])
    assert equal(*outputs)


def ip_adapter(unet):
    """Weights in IP-Adapter's format: the image's embedding projected to 4 tokens, keys and values per cross attention."""
    generator = torch.Generator().manual_seed(4)
    wide = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for number, name in enumerate(names):
        inside = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for side in ("k", "v"):
            layers[f"{2 * number + 1}.to_{side}_ip.weight"] = torch.randn(inside, wide, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * wide, 12, generator=generator),
        "proj.bias": torch.zeros(4 * wide),
        "norm.weight": torch.ones(wide),
        "norm.bias": torch.zeros(wide),
    }
    return {"image_proj": projection, "ip_adapter": layers}
