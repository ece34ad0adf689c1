"""The card's section on ComfyUI, A1111 and Forge: what each is told, and where one cannot draw with the LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from stepdistill.config import RunConfig
from stepdistill.export import comfy
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.facts import TeacherFacts

_WIDTHS = {(320, 768), (320, 1024), (320, 2048)}
"""First block and text of SD1.5, SD2.x and SDXL, by which the tools tell models apart."""
_SECTION = """## ComfyUI, A1111, Forge

`kohya/{{ kohya }}` goes into `models/loras` (ComfyUI) or `models/Lora` (A1111, Forge).
{% if teacher_loras %}
The teacher has LoRAs in it ({{ teacher_loras }}): load them as well.
{% endif %}
{% if odd_widths %}
These tools open U-Nets of SD1.5's, SD2.x's and SDXL's widths. This LoRA's base has others ({{ odd_widths }}), and they do
not open it as they are. One that does is told:
{% endif %}

{% if comfy is none %}
- ComfyUI: not with this LoRA: it draws with Stable Diffusion's noise schedule, and this teacher has another.
{% else %}
- ComfyUI:{% if workflow %} drag `kohya/{{ workflow }}` into its window; all is set there but your checkpoint's name.
  By hand:{% endif %}
 LoraLoaderModelOnly at strength 1.0
{%- if comfy.sampling %}, then ModelSamplingDiscrete with sampling {{ comfy.sampling }}, zsnr {{ zero_snr }}{% endif %};
{% if comfy.start is none %}
  KSampler with {{ steps }}, cfg 1.0, sampler euler, scheduler simple.
{% else %}
  SDTurboScheduler (steps 1, denoise {{ "%g" % comfy.start.denoise }})
{%- if comfy.start.first_sigma is not none %} -> SetFirstSigma {{ comfy.start.first_sigma }}{% endif %} -> AddNoise
  (RandomNoise, on the empty latent) -> LatentMultiply {{ "%g" % comfy.start.multiplier }} -> SamplerCustomAdvanced with
  DisableNoise, BasicGuider and euler. A KSampler would tell the U-Net another timestep.
{% endif %}
{% endif %}
{% if elsewhere is none %}
- A1111, Forge: `<lora:{{ stem }}:1>` in the prompt; sampling method Euler, schedule type SGM Uniform,
  {{ steps }}, CFG scale 1
{%- if comfy.sampling %}; the base set up as without this LoRA{% endif %}.
{% else %}
- A1111, Forge: not with this LoRA. {{ elsewhere }}
{% endif %}
"""


def tools_section(config: RunConfig, record: RungRecord, file: Path, teacher: TeacherFacts) -> str:
    """The section, in Markdown.

    Args:
        config: the run.
        record: the rung.
        file: kohya's; the workflow is named where it lies beside it.
        teacher: what its configs say.
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
        odd_widths=_odd_widths(teacher.unet),
        elsewhere=_not_elsewhere(setting, record, teacher),
    )
    return section.strip()


def _odd_widths(unet: Mapping[str, Any]) -> str | None:
    """The widths, where they are none that the tools know."""
    first, texts = (unet.get("block_out_channels") or [None])[0], unet.get("cross_attention_dim")
    if (first, texts) in _WIDTHS:
        return None
    return f"{first} channels in the first block, {texts} of the text"


def _not_elsewhere(setting: comfy.Setting | None, record: RungRecord, teacher: TeacherFacts) -> str | None:
    """Why A1111 and Forge do not draw with the LoRA, in a sentence; None where they do."""
    layers = teacher.unet.get("layers_per_block", 2)
    if setting is None:
        return "They draw with Stable Diffusion's noise schedule, and this teacher has another."
    if layers != 2:
        return f"They name its layers as if every block of the U-Net had two, and this one's have {layers}."
    if setting.start is not None:
        return f"Their samplers cannot tell the U-Net timestep {record.start_timestep} with pure noise."
    if record.prediction_type != teacher.prediction_type:
        return f"They take what the U-Net predicts from the base, and this one predicts `{record.prediction_type}`."
    return None
