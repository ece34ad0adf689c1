"""The card's section on ComfyUI, A1111 and Forge: the settings for each tool, or why it cannot use the LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from stepdistill.config import RunConfig
from stepdistill.export import comfy
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.facts import TeacherFacts

_WIDTHS = {(320, 768), (320, 1024), (320, 2048)}
"""Channels of the first block and width of the text embeddings of SD1.5, SD2.x and SDXL, by which tools recognise models."""
FLOW_NODES = {"StableDiffusion3Pipeline": "ModelSamplingSD3", "ZImagePipeline": "ModelSamplingAuraFlow"}
"""ComfyUI's node that sets the shift, by the base's pipeline: the former tells the network 1000 sigma, the latter sigma."""
_SECTION = """## ComfyUI, A1111, Forge

Put `kohya/{{ kohya }}` into `models/loras` (ComfyUI) or `models/Lora` (A1111, Forge).
{% if teacher_loras %}
The base model of this LoRA includes other LoRAs ({{ teacher_loras }}): load them as well.
{% endif %}
{% if unknown_base %}
{{ unknown_base }} Settings for a modified tool:
{% endif %}

{% if comfy is none %}
- ComfyUI: not with this LoRA. It samples with Stable Diffusion's noise schedule, and this base model has another one.
{% else %}
- ComfyUI:{% if workflow %} drag `kohya/{{ workflow }}` into its window and choose your checkpoint; all else is set.
  By hand:{% endif %}
 LoraLoaderModelOnly at strength 1.0
{%- if comfy.sampling %}, then ModelSamplingDiscrete with sampling {{ comfy.sampling }}, zsnr {{ zero_snr }}{% endif %};
{% if comfy.start is none %}
  KSampler with {{ steps }}, cfg 1.0, sampler euler, scheduler simple.
{% else %}
  SDTurboScheduler (steps 1, denoise {{ "%g" % comfy.start.denoise }})
{%- if comfy.start.first_sigma is not none %} -> SetFirstSigma {{ comfy.start.first_sigma }}{% endif %} -> AddNoise
  (RandomNoise, on the empty latent) -> LatentMultiply {{ "%g" % comfy.start.multiplier }} -> SamplerCustomAdvanced with
  DisableNoise, BasicGuider and euler. A KSampler would give the U-Net another timestep.
{% endif %}
{% endif %}
{% if elsewhere is none %}
- A1111, Forge: `<lora:{{ stem }}:1>` in the prompt; sampling method Euler, schedule type SGM Uniform,
  {{ steps }}, CFG scale 1
{%- if comfy.sampling %}; set up the base model as you would without this LoRA{% endif %}.
{% else %}
- A1111, Forge: not with this LoRA. {{ elsewhere }}
{% endif %}
"""


def tools_section(config: RunConfig, record: RungRecord, file: Path, teacher: TeacherFacts) -> str:
    """The section in Markdown.

    Args:
        config: config of the run.
        record: record of the rung.
        file: the kohya file; the section names ComfyUI's workflow if it exists beside this file.
        teacher: facts from the teacher's configs.
    """
    setting, workflow = comfy.setting_of(record, teacher.scheduler), comfy.workflow_name(file.name)
    template = jinja2.Template(_SECTION, undefined=jinja2.StrictUndefined, trim_blocks=True)
    section = template.render(
        kohya=file.name,
        stem=file.stem,
        workflow=workflow if (file.parent / workflow).is_file() else None,
        comfy=setting,
        steps=f"{record.student_steps} step{'s' if record.student_steps > 1 else ''}",
        zero_snr="true" if teacher.is_zero_snr else "false",
        teacher_loras=", ".join(
            f"{Path(part.path).name} at {part.weight:g}" for part in config.teacher.loras
        ),
        unknown_base=_unknown_base(teacher.unet, is_smaller=config.shrink is not None),
        elsewhere=_not_elsewhere(setting, record, teacher),
    )
    return section.strip()


def _unknown_base(unet: Mapping[str, Any], *, is_smaller: bool) -> str | None:
    """Why the tools cannot open the base model, in a sentence; None if they can."""
    first, texts = (unet.get("block_out_channels") or [None])[0], unet.get("cross_attention_dim")
    if (first, texts) not in _WIDTHS:
        return (
            "These tools recognise the U-Nets of SD1.5, SD2.x and SDXL by their widths. This LoRA's base has other widths\n"
            f"({first} channels in the first block, {texts} in the text embeddings), so the unmodified tools cannot open it."
        )
    if is_smaller:
        known = "the models that these tools know"
        return f"This LoRA's base has fewer blocks than {known}, so the unmodified tools cannot open it."
    return None


def _not_elsewhere(setting: comfy.Setting | None, record: RungRecord, teacher: TeacherFacts) -> str | None:
    """One sentence on why A1111 and Forge cannot use the LoRA; None if they can."""
    layers = teacher.unet.get("layers_per_block", 2)
    if setting is None:
        return "They sample with Stable Diffusion's noise schedule, and this base model has another one."
    if layers != 2:
        return f"They expect two layers in every block of the U-Net, and this one has {layers}."
    if setting.start is not None:
        return f"Their samplers cannot give the U-Net pure noise at timestep {record.start_timestep}."
    if record.prediction_type != teacher.prediction_type:
        return f"They use the base model's prediction type, and this LoRA needs `{record.prediction_type}`."
    return None
