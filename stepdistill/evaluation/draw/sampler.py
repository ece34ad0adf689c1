"""Draws images with the plain diffusers pipeline and a LoRA loaded from disk.

Each image has its own random generator, so image k depends on its prompt and on (seed, k) alone: not on the batch size, the
number of processes or interruptions. FlowMatchLCMScheduler is an exception: its pipelines give it no generator, so the noise
that it adds depends on the images that are drawn together, too.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from PIL import Image

from stepdistill.config import Expert, RunConfig
from stepdistill.data.buckets import drawn_size, scheduler_of
from stepdistill.disk.durable import read_json, sha256_file, sha256_json
from stepdistill.errors import NonFiniteError
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import ONNX_FILES, Row, lora_file, lora_scheduler
from stepdistill.export.exported import read_scheduler
from stepdistill.export.scheduler import step_options, student_scheduler
from stepdistill.models.network.kind import kind_of_pipeline, load_network
from stepdistill.rng import derive_seed, generator
from stepdistill.run.log import PhaseProgress
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import Processes
from stepdistill.sampling import load_onnx, load_rung
from stepdistill.teacher.experts import lora_files, main_expert, teachers_key
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import (
    encoder_fingerprint,
    fingerprint,
    load_pipeline,
    loading,
)
from stepdistill.teacher.source import teacher_folder


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    first: int,
    numbers: Sequence[int] | None = None,
    what: str = "the pipeline",
    **options: Any,
) -> tuple[list[Image.Image], torch.Tensor]:
    """Images of the prompts, and their final latents (n, C, h, w), float32 on the CPU.

    Image k of the call has its own generator, seeded by (seed, numbers[k]); by default numbers are counted from `first`.
    guidance_scale: as in teacher.guidance_scale; 1 is off.
    `what` draws, for the message; `options` are passed to the pipeline. NonFiniteError if an image holds a number that is
    not finite: as bytes it would be black.
    """
    numbers = range(first, first + len(prompts)) if numbers is None else numbers
    last: dict[str, torch.Tensor] = {}

    def keep(_pipeline: DiffusionPipeline, _step: int, _timestep: int, state: dict) -> dict:
        last["latents"] = state["latents"]
        return state

    kind = kind_of_pipeline(pipeline)
    options |= step_options(pipeline.scheduler, steps) | kind.call_options(pipeline)
    with (
        _requiring_finite_images(pipeline.vae, what, numbers),
        torch.random.fork_rng(devices=[pipeline.device] if pipeline.device.type == "cuda" else []),
    ):
        # some samplers add noise that a pipeline of flows takes from the global generator
        torch.manual_seed(derive_seed(seed, "sampler", *numbers))
        images = pipeline(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=kind.pipeline_guidance(guidance_scale),
            generator=[generator(seed, "image", number) for number in numbers],
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
            **options,
        ).images
    return images, last["latents"].float().cpu()


@contextlib.contextmanager
def _requiring_finite_images(vae: Any, what: str, numbers: Sequence[int]) -> Iterator[None]:
    """Inside it, NonFiniteError if the VAE decodes an image with a number that is not finite.

    Args:
        vae: the pipeline's VAE.
        what: what draws, for the message.
        numbers: of the images.
    """

    decoded = 0  # the pipeline may decode a batch in parts

    def check(_decoder: torch.nn.Module, _latents: object, images: torch.Tensor) -> None:
        nonlocal decoded
        is_finite = images.isfinite().flatten(1).all(dim=1)
        number = numbers[decoded + int(is_finite.int().argmin())]
        decoded += len(images)
        if not bool(is_finite.all()):
            raise NonFiniteError(
                f"image {number} of {what} holds numbers that are not finite; fix: "
                f"evaluation.dtype=float32 if it is half precision; else the model is damaged, which `stepdistill doctor` "
                f"finds in the teacher, and `stepdistill distill --rung` trains a damaged rung again"
            )

    handle = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


class Sampler:
    """Draws the images of any row with one pipeline, which loads each row's LoRA and scheduler when needed.

    Args:
        config: the run's config.
        device: device of the pipeline.
    """

    def __init__(self, config: RunConfig, *, device: torch.device | str = "cpu") -> None:
        self._config, self._device = config, device
        self._base = teacher_folder(config)
        self._base_config = dict(scheduler_of(config, TeacherFacts.of_folder(self._base)))
        self._base_key = [fingerprint(self._base), encoder_fingerprint(self._base), self._base_config]
        self._pipeline: DiffusionPipeline | None = None
        self._base_scheduler: Any = None
        self._torch_network: Any = None
        self._loaded: tuple[object, ...] | None = None
        self._scale = 1.0

    def draw(
        self, row: Row, prompts: Sequence[str], *, seed: int, first: int = 0
    ) -> tuple[list[Image.Image], torch.Tensor]:
        """`draw` with the LoRA, scheduler, steps and guidance scale of a row. Of several teachers each draws its prompts."""
        if not self._asks_experts(row):
            return self._draw(row, prompts, seed=seed, numbers=range(first, first + len(prompts)))
        teachers = self._config.teachers
        experts = [row.expert if row.expert is not None else main_expert(teachers, p) for p in prompts]
        drawn: dict[int, tuple[Image.Image, torch.Tensor]] = {}
        for expert in sorted(set(experts)):
            rows = [k for k, chosen in enumerate(experts) if chosen == expert]
            images, latents = self._draw(
                replace(row, expert=expert),
                [prompts[k] for k in rows],
                seed=seed,
                numbers=[first + k for k in rows],
            )
            drawn |= dict(zip(rows, zip(images, latents, strict=True), strict=True))
        return [drawn[k][0] for k in sorted(drawn)], torch.stack([drawn[k][1] for k in sorted(drawn)])

    def _asks_experts(self, row: Row) -> bool:
        """Whether a row is drawn by one or several of the config's `teachers`."""
        is_teacher = row.student_steps is None and row.lora is None and not row.is_base
        return bool(self._config.teachers) and is_teacher

    def _draw(
        self, row: Row, prompts: Sequence[str], *, seed: int, numbers: Sequence[int]
    ) -> tuple[list[Image.Image], torch.Tensor]:
        pipeline = self._ready(row)
        options = self._size_options()
        if row.guidance_scale > 1:
            kind, unconditional = kind_of_pipeline(pipeline), self._config.teacher.unconditional
            options |= kind.unconditional_options(pipeline, unconditional, len(prompts))
        if row.lora is not None:
            if row.lora.eta:
                options["eta"] = row.lora.eta
            if row.lora.timesteps is not None:
                options["timesteps"] = list(row.lora.timesteps)
        return draw(
            pipeline,
            prompts,
            steps=row.steps,
            guidance_scale=row.guidance_scale,
            seed=seed,
            first=0,
            numbers=numbers,
            what=f"the row {row.name}"
            + (f", drawn by the {row.student_steps}-step rung" if row.student_steps else ""),
            **options,
        )

    def _size_options(self) -> dict[str, Any]:
        """Height and width, if the pipeline's own default is not the size that students are trained at."""
        size = drawn_size(self._config, TeacherFacts.of_folder(self._base))
        return {} if size is None else {"height": size[0], "width": size[1]}

    def key(self, row: Row, prompts: Sequence[str], *, seed: int) -> str:
        """A hash of everything that the images of a row depend on."""
        weights = row.weights(self._config.run_dir)
        what = asdict(row) | {"lora": row.lora and row.lora.model_dump(mode="json", exclude={"path"})}
        what = {
            k: v for k, v in what.items() if k not in ("onnx", "expert", "is_base") or v not in (None, False)
        }  # later settings
        made_by = [*self._base_key, weights and sha256_file(weights), self._config.evaluation.dtype]
        if self._config.teacher.unconditional != "auto":
            made_by.append(self._config.teacher.unconditional)
        beside = weights and (weights.parent if row.onnx is None else weights.parents[1])
        made_by.append(beside and read_json(beside / "scheduler" / "scheduler_config.json"))
        if self._asks_experts(row):
            made_by.append(teachers_key(self._config))
        if size := self._size_options():
            made_by.append(size)
        return sha256_json([what, made_by, list(prompts), seed])

    def ensure(
        self, row: Row, folder: Path, prompts: Sequence[str], *, seed: int, processes: Processes
    ) -> dict[str, Any]:
        """Draws the missing images of a row into the folder, each process its share.

        Returns the manifest in the main process, {} in others; its seconds_per_image is the median over chunks, which
        leaves the warm-up out.
        """
        row_images, size = RowImages(folder), self._config.evaluation.batch_size
        if processes.is_main:
            about = {"name": row.name, "steps": row.steps, "nfe": row.nfe, "num_images": len(prompts)}
            key = self.key(row, prompts, seed=seed)
            row_images.begin(key, about | {"prompts_sha256": sha256_json(list(prompts)), "seed": seed})
        processes.wait()
        markers = row_images.markers()
        processes.wait()
        row_images.drop_damaged(processes.share(markers))
        processes.wait()
        missing = row_images.missing(len(prompts), size)
        processes.wait()  # no process draws before all have listed the missing images
        mine = processes.share(missing)
        total = sum(map(len, mine))
        shown = processes.is_main and total >= 2 * size
        with PhaseProgress(
            f"draw {row.name}", total, logging_steps=max(size, total // 4), enabled=shown
        ) as bar:
            done = 0
            for chunk in mine:
                began = time.monotonic()
                chunk_prompts = prompts[chunk.start : chunk.stop]
                images, latents = self.draw(row, chunk_prompts, seed=seed, first=chunk.start)
                seconds = (time.monotonic() - began) / len(chunk)
                row_images.add(chunk.start, images, latents, seconds=seconds)
                done += len(chunk)
                bar.update(done, {"s / image": seconds})
        processes.wait()
        return row_images.finish() if processes.is_main else {}

    def _ready(self, row: Row) -> DiffusionPipeline:
        if self._pipeline is None:
            dtype = getattr(torch, self._config.evaluation.dtype)
            self._pipeline = load_pipeline(self._base, dtype=dtype).to(self._device)
            self._base_scheduler = self._pipeline.scheduler
        self._load(self._pipeline, row)
        if row.lora_scale != self._scale:  # cheaper than loading the LoRA again
            active = self._pipeline.get_active_adapters()
            # pipeline.set_adapters fails for a U-Net whose levels have different numbers of blocks
            for component in self._pipeline.get_list_adapters():
                scales = [row.lora_scale] * len(active)
                set_weights_and_activate_adapters(getattr(self._pipeline, component), active, scales)
            self._scale = row.lora_scale
        return self._pipeline

    def _load(self, pipeline: DiffusionPipeline, row: Row) -> None:
        """Loads the row's LoRA at weight 1, and its scheduler, unless they are already loaded."""
        loaded = (row.student_steps, row.lora, row.onnx, row.expert, row.is_base)
        if loaded == self._loaded:
            return
        self._loaded, self._scale = None, 1.0  # stays None if loading fails
        part = kind_of_pipeline(pipeline).component
        if self._torch_network is None:
            self._torch_network = getattr(pipeline, part)
        setattr(pipeline, part, self._torch_network)
        pipeline.unload_lora_weights()
        config = dict(self._base_scheduler.config) | self._base_config
        if row.student_steps is not None and row.onnx is not None:
            folder = rung_folder(self._config.run_dir, row.student_steps)
            pipeline.scheduler = read_scheduler(folder)
            load_onnx(pipeline, (folder / ONNX_FILES[row.onnx]).parent)
        elif row.student_steps is not None:
            load_rung(pipeline, rung_folder(self._config.run_dir, row.student_steps))
        elif row.lora is not None:
            file = lora_file(row.lora)
            with loading("evaluation.loras", file):
                pipeline.load_lora_weights(file.parent, weight_name=file.name)
            pipeline.scheduler = lora_scheduler(row.lora, config)
        else:
            pipeline.scheduler = student_scheduler(config, config.get("prediction_type", "epsilon"))
            if row.expert is not None:
                self._load_expert(pipeline, self._config.teachers[row.expert])
        self._loaded = loaded

    def _load_expert(self, pipeline: DiffusionPipeline, expert: Expert) -> None:
        """Loads the LoRAs of one of several teachers, each at its weight, or its U-Net."""
        if expert.path is not None:
            part = kind_of_pipeline(pipeline).component
            folder, dtype = Path(expert.path).expanduser(), getattr(pipeline, part).dtype
            setattr(pipeline, part, load_network(folder, dtype=dtype).to(self._device))
            return
        files = {f"lora{number}": file for number, file in enumerate(lora_files(expert))}
        for name, file in files.items():
            with loading("teachers", file):
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        if files:
            pipeline.set_adapters(list(files), [lora.weight for lora in expert.loras])
