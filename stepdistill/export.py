"""A rung's folder made complete: beside the LoRA the scheduler that samples it right, and a card that says how."""

from pathlib import Path

import jinja2
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from stepdistill.config import RunConfig
from stepdistill.durable import read_json, write_text
from stepdistill.models.folder import EMBEDDED_TEACHER, teacher_kind
from stepdistill.models.loading import load_schedule, read_scheduler_config
from stepdistill.rungs import RungRecord, require_rung, rung_folder
from stepdistill.teacher_source import teacher_folder

_CARD = """---
library_name: diffusers
tags: [lora, text-to-image, few-step, stepdistill]
---
# {{ name }}: {{ steps }}

A LoRA that makes its teacher draw in {{ steps }}, without guidance.
Distilled {{ path }} by stepdistill; rank {{ record.lora_rank }}, alpha the same.
Base U-Net fingerprint `{{ record.base_fingerprint }}`: the LoRA is right on that base, and on fine-tunes of it.

```python
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
{% if embedded %}
from stepdistill.models.folder import embedded_folder
{% endif %}

pipeline = DiffusionPipeline.from_pretrained({{ teacher }}, dtype=torch.float32)
pipeline.load_lora_weights({{ folder }})
pipeline.scheduler = DDIMScheduler.from_pretrained({{ folder }}, subfolder="scheduler")
image = pipeline({{ prompt }}, num_inference_steps={{ record.student_steps }}, guidance_scale=1.0).images[0]
```

The scheduler matters: trailing timesteps, no clipping, `prediction_type="{{ record.prediction_type }}"`
{%- if record.start_timestep is not none %}, betas that end at timestep {{ record.start_timestep }}{% endif %}.
So do the steps (this LoRA is for {{ record.student_steps }}) and the guidance (it is baked in: 1.0 means off).
"""


def student_scheduler(
    teacher_scheduler_config: dict, prediction_type: str, *, start_timestep: int | None = None
) -> DDIMScheduler:
    """DDIM on the teacher's betas with what few steps need: trailing spacing, alpha 1 at the end, no clipping.

    At 8, 4, 2 and 1 steps its (timestep, prev_timestep) pairs are the trained ones exactly. start_timestep: the betas end
    there, so that one trailing step is told it with the pure noise.
    """
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    kept = {
        key: teacher_scheduler_config[key]
        for key in (*betas, "num_train_timesteps")
        if key in teacher_scheduler_config
    }
    if start_timestep is not None:
        schedule, _ = load_schedule(teacher_scheduler_config)
        alphas_cumprod = schedule.alphas_cumprod[: start_timestep + 1]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        kept |= {"trained_betas": (1 - alphas_cumprod / before).tolist(), "rescale_betas_zero_snr": False}
        kept["num_train_timesteps"] = len(alphas_cumprod)
    return DDIMScheduler(
        **kept,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def export_rung(config: RunConfig, student_steps: int) -> Path:
    """Writes scheduler/ and README.md into a finished rung's folder and returns it; ValueError where it is not finished."""
    record = require_rung(config.run_dir, student_steps)
    folder = rung_folder(config.run_dir, student_steps)
    base = teacher_folder(config)
    teacher_scheduler = read_scheduler_config(base)
    scheduler = student_scheduler(
        teacher_scheduler, record.prediction_type, start_timestep=record.start_timestep
    )
    scheduler.save_pretrained(folder / "scheduler")
    write_text(folder / "README.md", model_card(config, record, folder))
    return folder


def model_card(config: RunConfig, record: RungRecord, folder: Path) -> str:
    """The rung's README.md."""
    students = [r.student_steps for r in config.ladder]
    students = students[: students.index(record.student_steps) + 1]
    first = f"{config.ladder[0].teacher_steps} steps with guidance {config.teacher.guidance_scale:g}"
    embedded = config.teacher.path == EMBEDDED_TEACHER
    template = jinja2.Template(_CARD, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return template.render(
        name=config.name,
        record=record,
        steps=f"{record.student_steps} step{'s' if record.student_steps > 1 else ''}",
        path=" -> ".join([first, *map(str, students)]),
        embedded=embedded,
        teacher='embedded_folder("teacher")' if embedded else repr(_named_teacher(config)),
        folder=repr(folder.as_posix()),
        prompt=repr(config.preview.prompts[0]),
    )


def _named_teacher(config: RunConfig) -> str:
    """How a snippet names the teacher: as the config does, or where one was made of a file or with LoRAs, its folder."""
    made = teacher_kind(config.teacher.path) == "file" or config.teacher.loras
    return teacher_folder(config).as_posix() if made else config.teacher.path


def load_few_step(pipeline: DiffusionPipeline, folder: Path) -> RungRecord:
    """Loads an exported rung into a vanilla pipeline: LoRA, scheduler. Returns its record: steps; guidance is 1.

    ValueError where the folder holds no exported rung.
    """
    raw = read_json(folder / "rung.json")
    if raw is None or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(
            f"{folder} holds no exported rung: run `stepdistill export` (pipelines/export.py) first"
        )
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return RungRecord(**raw)
