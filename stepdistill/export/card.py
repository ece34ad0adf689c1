"""A rung's README.md: a model card for the Hub with a code snippet, settings for other tools, numbers and an image."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from stepdistill.config import RunConfig
from stepdistill.data.buckets import drawn_size
from stepdistill.export.card_tools import FLOW_NODES
from stepdistill.export.scheduler import StudentScheduler, step_options, trained_timesteps
from stepdistill.models.network.kind import kind_of_facts
from stepdistill.report.markdown import markdown_table, table_notes
from stepdistill.report.results import read_results
from stepdistill.run.rungs import RungRecord
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.folder import EMBEDDED, teacher_kind
from stepdistill.teacher.source import local_folder, teacher_folder

logger = logging.getLogger(__name__)
GRID = "grid.png"
_TAGS = ["lora", "text-to-image", "few-step", "distillation", "stepdistill"]
_CARD = """---
{{ front_matter }}---
# {{ name }}: {{ steps }}

With this LoRA, its base model draws in {{ steps }}, without classifier-free guidance.
Distilled with stepdistill in stages: {{ path }}. LoRA rank and alpha: {{ rank }}.
{% if kept %}
This is the trained LoRA reduced to a lower rank by singular value decomposition. It keeps {{ kept }} of the energy (sum of
squared singular values) and was not evaluated.
{% endif %}
Fingerprint of the base network: `{{ record.base_fingerprint }}`. Use the LoRA with that base or a fine-tune of it.
{% if table %}

{{ table }}

{{ notes }}
{% endif %}
{% if grid %}

![rows: models, columns: prompts, the same noise in each column]({{ grid }})
{% endif %}

## diffusers

```python
import torch
from diffusers import {{ scheduler }}, DiffusionPipeline
{% if embedded %}
from stepdistill.teacher.folder import embedded_folder
{% endif %}

pipeline = DiffusionPipeline.from_pretrained({{ teacher }}, dtype=torch.{{ dtype }})
pipeline.load_lora_weights({{ folder }})
pipeline.scheduler = {{ scheduler }}.from_pretrained({{ folder }}, subfolder="scheduler")
{% if sigmas %}
image = pipeline({{ prompt }}, sigmas={{ sigmas }}, guidance_scale={{ off }}{{ call_options }}).images[0]
```

Use the scheduler of this folder, with shift {{ shift }}, and these sigmas: `num_inference_steps` alone would place the steps
elsewhere. With the shift they are the timesteps {{ timesteps }} that this LoRA is trained at.
{% else %}
image = pipeline({{ prompt }}, num_inference_steps={{ record.student_steps }}, guidance_scale=1.0).images[0]
```

Use the scheduler of this folder: trailing timesteps {{ timesteps }}, no clipping,
`prediction_type="{{ record.prediction_type }}"`
{%- if record.start_timestep is not none %}, betas that end at timestep {{ record.start_timestep }}{% endif %}.
{% endif %}
Use {{ steps }}, for which this LoRA is trained, and `guidance_scale={{ off }}` (off): guidance is distilled into the LoRA.
`stepdistill.sampling.load_few_step(pipeline, folder)` sets all of this, and warns if something does not fit.
{% if euler_share < 0.99 %}
Only DDIMScheduler is right for this LoRA: EulerDiscreteScheduler begins with the noise scaled by {{ "%.2f" % euler_share }}.
{% endif %}
{% if sigmas %}

## ComfyUI

Put `pytorch_lora_weights.safetensors` into `models/loras`: ComfyUI reads all of its names (checked against ComfyUI's list of
them; no image was drawn there). LoraLoaderModelOnly at strength 1.0, then {{ node }} with shift {{ shift }}, then KSampler
with {{ steps }}, cfg 1.0, sampler euler, scheduler simple.
{% else %}
`pytorch_lora_weights.safetensors` is for diffusers only: other tools load a part of it and silently ignore the rest.
{% endif %}
{% if tools %}

{{ tools }}
{% endif %}
"""


def model_card(
    config: RunConfig,
    record: RungRecord,
    folder: Path,
    scheduler: StudentScheduler,
    *,
    tools: str | None = None,
    repository: str | None = None,
    energy_kept: float | None = None,
) -> str:
    """The text of README.md for a folder with a LoRA.

    Args:
        config: config of the run.
        record: record of the rung.
        folder: the LoRA's folder.
        scheduler: the scheduler that samples the rung.
        tools: section on ComfyUI, A1111 and Forge (card_tools); None without a kohya file.
        repository: OWNER/NAME on the Hub if the folder is uploaded, for the snippet.
        energy_kept: share of the energy (0 to 1) if the LoRA was reduced to a lower rank; the card then leaves out the run's
            numbers, which belong to the trained LoRA.
    """
    students = [r.student_steps for r in config.ladder]
    students = students[: students.index(record.student_steps) + 1]
    facts = TeacherFacts.of_folder(teacher_folder(config))
    guidance = kind_of_facts(facts).pipeline_guidance(config.teacher.guidance_scale)
    first = f"{config.ladder[0].teacher_steps} steps with guidance {guidance:g}"
    results = _results(config.run_dir)
    template = jinja2.Template(_CARD, undefined=jinja2.StrictUndefined, trim_blocks=True)
    embedded = EMBEDDED.get(config.teacher.path)
    return template.render(
        front_matter=_front_matter(config),
        name=config.name,
        record=record,
        rank=record.lora_rank,
        steps=f"{record.student_steps} step{'s' if record.student_steps > 1 else ''}",
        path=" -> ".join([first, *map(str, students)]),
        embedded=embedded,
        teacher=f'embedded_folder("{embedded}")' if embedded else repr(_named_teacher(config, repository)),
        folder=repr(repository or folder.as_posix()),
        prompt=repr(config.preview.prompts[0]),
        table=None if energy_kept is not None else _table(results, record.student_steps),
        kept=None if energy_kept is None else f"{100 * energy_kept:.1f} %",
        notes=table_notes(results),
        grid=GRID if (folder / GRID).is_file() else None,
        tools=tools,
        **_sampling(config, facts, scheduler, record.student_steps),
    )


def _sampling(
    config: RunConfig, facts: TeacherFacts, scheduler: StudentScheduler, steps: int
) -> dict[str, Any]:
    """What the snippet and the settings say about the sampler; the sigmas are those of a flow, before the shift."""
    size = drawn_size(config, facts)
    options = {} if size is None else {"height": size[0], "width": size[1]}
    options |= facts.call_options
    sigmas = step_options(scheduler, steps).get("sigmas")
    return {
        "scheduler": type(scheduler).__name__,
        "timesteps": trained_timesteps(scheduler, steps),
        "sigmas": sigmas,
        "shift": scheduler.config.get("shift"),
        "node": FLOW_NODES.get(facts.pipeline_class),
        "call_options": "".join(f", {name}={value}" for name, value in options.items()),
        "dtype": "float32" if facts.layout.text is None or _is_small(config) else "bfloat16",
        "off": kind_of_facts(facts).pipeline_guidance(1.0),
        "euler_share": 1.0 if sigmas else float((1 - scheduler.alphas_cumprod[-1]).sqrt()),
    }


def _is_small(config: RunConfig) -> bool:
    """Whether the teacher is one of those that ship in the package, which float32 costs nothing."""
    return config.teacher.path in EMBEDDED


def _front_matter(config: RunConfig) -> str:
    facts: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": _TAGS}
    hub = config.teacher.path if teacher_kind(config.teacher.path) == "hub" else None
    if base_model := config.export.base_model or hub:
        facts |= {"base_model": base_model, "base_model_relation": "adapter"}
    if config.export.license is not None:
        facts["license"] = config.export.license
    return yaml.safe_dump(facts, sort_keys=False)


def _results(run_dir: Path) -> dict[str, Any]:
    """The run's results; empty if it is not evaluated yet, or if the file is damaged, which is logged as a warning."""
    try:
        return read_results(run_dir) or {}
    except ValueError as error:
        logger.warning("the card is written without numbers: %s", error)
        return {}


def _table(results: Mapping[str, Any], steps: int) -> str | None:
    """The rows of the reference, and of undistilled teacher and student at this step count; None if there are none."""
    rows = [
        row
        for row in results.get("rows") or []
        if isinstance(row, dict)
        and (
            row.get("row") == results.get("reference")
            or (row.get("kind"), row.get("steps")) in (("student", steps), ("teacher", steps))
        )
    ]
    return markdown_table(rows) if rows else None


def _named_teacher(config: RunConfig, repository: str | None) -> str:
    """The teacher's name in the snippet: for an upload export.base_model if it is set; else teacher.path, or the converted
    folder if the teacher is a single file or has LoRAs merged."""
    if repository is not None and config.export.base_model is not None:
        return config.export.base_model
    kind = teacher_kind(config.teacher.path)
    if kind == "file" or config.teacher.loras:
        return teacher_folder(config).as_posix()
    return config.teacher.path if kind == "hub" else local_folder(config.teacher.path).absolute().as_posix()
