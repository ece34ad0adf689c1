"""Images for one row of the table, by the vanilla diffusers pipeline, kept with a hash of all that they depend on.

evaluation/<row>/images/000000.png ..   latents.safetensors   manifest.json (written last)
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.config import RunConfig
from stepdistill.durable import read_json, sha256_json, write_json
from stepdistill.export import load_few_step, student_scheduler
from stepdistill.models.folder import resolve_model_folder
from stepdistill.models.loading import fingerprint, load_pipeline
from stepdistill.rng import derive_seed, generator
from stepdistill.rungs import read_rung, rung_folder


@dataclass(frozen=True)
class Row:
    """One way to draw: `student_steps` names the rung whose LoRA is loaded, None is the undistilled teacher."""

    name: str
    steps: int
    guidance_scale: float
    student_steps: int | None = None

    @property
    def nfe(self) -> int:
        """U-Net evaluations per image; guidance counts two a step."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)


def rows_of(config: RunConfig) -> list[Row]:
    """The table's rows: the teacher at its step counts, then every rung of the ladder."""
    teachers = [
        Row(f"teacher-{n}", n, config.teacher.guidance_scale) for n in config.evaluation.teacher_steps
    ]
    students = [
        Row(f"student-{r.student_steps}", r.student_steps, 1.0, r.student_steps) for r in config.ladder
    ]
    return teachers + students


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    first: int,
) -> tuple[list[Image.Image], torch.Tensor]:
    """Images of prompts, and their final latents (n, C, h, w): image k of the set comes from a generator of its own,
    seeded by (seed, first + k), so it does not depend on the batch."""
    last: dict[str, torch.Tensor] = {}

    def keep(_pipeline: DiffusionPipeline, _step: int, _timestep: int, state: dict) -> dict:
        last["latents"] = state["latents"]
        return state

    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[generator(seed, "image", first + k) for k in range(len(prompts))],
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images
    return images, last["latents"].float().cpu()


class Generator:
    """Makes the rows of one run with one pipeline.

    Args:
        config: the run.
        prompts: one per image.
        device: where to draw.
    """

    def __init__(self, config: RunConfig, prompts: list[str], *, device: torch.device | str = "cpu") -> None:
        self._config, self._prompts = config, prompts
        self._base = resolve_model_folder(config.teacher.path)
        self._fingerprint = fingerprint(self._base)
        self._pipeline: DiffusionPipeline | None = None
        self._device = device
        self.seed = derive_seed(config.seed, "evaluation")

    def row_folder(self, row: Row) -> Path:
        """Where a row's images are."""
        return self._config.run_dir / "evaluation" / row.name

    def ensure(self, row: Row, *, progress: Callable[[int], None] = lambda done: None) -> dict:
        """Draws a row unless images of the same hash are there; returns its manifest: key, nfe, and
        seconds_per_image, the median over batches."""
        folder = self.row_folder(row)
        record = None if row.student_steps is None else read_rung(self._config.run_dir, row.student_steps)
        key = sha256_json(
            [asdict(row), self._fingerprint, record and record.sha256, self._prompts, self.seed]
        )
        manifest = read_json(folder / "manifest.json")
        if manifest is not None and manifest["key"] == key:
            progress(len(self._prompts))
            return manifest
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        pipeline = self._ready(row)
        batch_size = self._config.evaluation.batch_size
        draw(pipeline, self._prompts[:batch_size], steps=1, guidance_scale=1.0, seed=0, first=0)  # warm-up
        latents, seconds = [], []
        for start in range(0, len(self._prompts), batch_size):
            chunk = self._prompts[start : start + batch_size]
            began = time.monotonic()
            images, final = draw(
                pipeline,
                chunk,
                steps=row.steps,
                guidance_scale=row.guidance_scale,
                seed=self.seed,
                first=start,
            )
            seconds.append((time.monotonic() - began) / len(chunk))
            latents.append(final)
            for k, image in enumerate(images):
                image.save(folder / "images" / f"{start + k:06d}.png", compress_level=1)
            progress(len(chunk))
        save_file({"latents": torch.cat(latents).contiguous()}, folder / "latents.safetensors")
        manifest = {
            "key": key,
            **asdict(row),
            "nfe": row.nfe,
            "num_images": len(self._prompts),
            "seconds_per_image": statistics.median(seconds),
            "prompts_sha256": sha256_json(self._prompts),
        }
        write_json(folder / "manifest.json", manifest)
        return manifest

    def _ready(self, row: Row) -> DiffusionPipeline:
        if self._pipeline is None:
            self._pipeline = load_pipeline(self._base).to(self._device)
            self._teacher_scheduler = dict(self._pipeline.scheduler.config)
        self._pipeline.unload_lora_weights()
        if row.student_steps is None:
            kind = self._teacher_scheduler.get("prediction_type", "epsilon")
            self._pipeline.scheduler = student_scheduler(self._teacher_scheduler, kind)
        else:
            load_few_step(self._pipeline, rung_folder(self._config.run_dir, row.student_steps))
        return self._pipeline


def read_images(folder: Path, num_images: int) -> torch.Tensor:
    """uint8 (N, 3, H, W): the images of a row."""
    pictures = [np.asarray(Image.open(folder / "images" / f"{k:06d}.png")) for k in range(num_images)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def read_latents(folder: Path) -> torch.Tensor:
    """Final latents (N, C, h, w) of a row."""
    return load_file(folder / "latents.safetensors")["latents"]
