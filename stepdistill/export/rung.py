"""Exports a rung: writes the scheduler and the card beside its LoRA, and the LoRA in the formats of other tools.

rungs/<steps>/
  pytorch_lora_weights.safetensors   the LoRA for diffusers
  rung.json  base.json               the rung's record; the identity of the base model
  scheduler/  README.md  grid.png    the scheduler; the model card and its image
  kohya/<name>_<steps>step_lora.safetensors, kohya/<name>_<steps>step_comfyui.json
  fused/unet/                        the base with the LoRA merged
  onnx/unet.onnx                     the merged U-Net for onnxruntime
  onnx-int8/unet.onnx                the same with 8-bit weights and activations
  rank<R>/                           all of this at a lower rank
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import RunConfig
from stepdistill.data.buckets import scheduler_of
from stepdistill.data.cache import load_cache
from stepdistill.disk.durable import (
    read_sealed,
    sealed,
    sha256_file,
    write_bytes,
    write_json,
    write_sealed,
    write_text,
)
from stepdistill.export import comfy, kohya
from stepdistill.export.card import GRID, model_card
from stepdistill.export.card_tools import tools_section
from stepdistill.export.check import check_formats, formats_for
from stepdistill.export.exported import read_scheduler, write_facts
from stepdistill.export.fused import fused_unet, write_fused
from stepdistill.export.int8_onnx import write_int8
from stepdistill.export.onnx_unet import write_onnx
from stepdistill.export.rank import reduce_rank
from stepdistill.export.scheduler import StudentScheduler, student_scheduler, trained_timesteps
from stepdistill.models.identity import identity_of_folder
from stepdistill.models.lora_file import Lora, read_lora, write_lora
from stepdistill.rng import derive_seed
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, require_rung, rung_folder
from stepdistill.run.settings import config_hash
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.source import teacher_folder

logger = logging.getLogger(__name__)
KEPT = "kept.json"
"""In the folder of a lower rank: the share of the trained LoRA's energy that it keeps."""
HEADER = "stepdistill"
"""Key in a kohya file's header under which stepdistill stores the rung's record and sampling settings, as JSON."""


def export_rung(config: RunConfig, student_steps: int) -> Path:
    """Writes the formats of config.export into a finished rung's folder, or its rank<R>/, and returns that folder.

    ValueError if the rung is not finished, or its LoRA cannot be used.
    """
    record = require_rung(config.run_dir, student_steps)
    folder = rung_folder(config.run_dir, student_steps)
    check_formats(config, _facts(config))
    lora = read_lora(folder / WEIGHT_NAME)
    if config.export.rank is not None:
        reduced = reduce_rank(lora, config.export.rank)
        logger.info(
            "export: rank %d keeps %.2f %% of the energy, and at least %.2f %% in every layer",
            config.export.rank,
            100 * reduced.energy_kept,
            100 * min(reduced.energy_by_module.values()),
        )
        lora, folder = reduced.lora, folder / f"rank{config.export.rank}"
        write_sealed(folder / KEPT, {"rank": config.export.rank, "energy_kept": reduced.energy_kept})
        file = write_lora(folder, lora.state(), lora.config, part=lora.part)
        record = dataclasses.replace(record, lora_rank=lora.rank, sha256=sha256_file(file))
        record.write(folder)
    _complete(config, record, lora, folder)
    return folder


def _facts(config: RunConfig) -> TeacherFacts:
    return TeacherFacts.of_folder(teacher_folder(config))


def _complete(config: RunConfig, record: RungRecord, lora: Lora, folder: Path) -> None:
    base, facts = teacher_folder(config), _facts(config)
    formats = formats_for(config, facts)
    scheduler = student_scheduler(
        scheduler_of(config, facts), record.prediction_type, start_timestep=record.start_timestep
    )
    identity = identity_of_folder(base).as_json()
    write_facts(folder, scheduler, identity)
    if "kohya" in formats:
        _write_kohya(config, record, lora, scheduler, folder, identity, facts)
    if {"fused", "onnx"} & set(formats):
        unet = fused_unet(base, lora)
        if "onnx" in formats:
            tokens = facts.configs["text_encoder"].get("max_position_embeddings", 77)
            error = write_onnx(folder / "onnx", unet, tokens=int(tokens))
            logger.info("export: onnxruntime's output differs from torch's by %.1e (relative)", error)
            if config.export.quantize == "int8":
                _write_int8(config, record, folder, unet, scheduler)
        if "fused" in formats:
            write_fused(folder / "fused" / "unet", unet, dtype=_dtype(config))
    write_card(config, record, folder, scheduler)


def _write_int8(
    config: RunConfig,
    record: RungRecord,
    folder: Path,
    unet: UNet2DConditionModel,
    scheduler: StudentScheduler,
) -> None:
    steps, cache = record.student_steps, load_cache(config)
    about = write_int8(folder, unet, scheduler, cache, steps=steps, seed=derive_seed(config.seed, "int8"))
    logger.info(
        "export: the U-Net in int8 has %.1f MiB in place of %.1f; its output differs by %.1f %%",
        about["bytes"] / 2**20,
        about["float32_bytes"] / 2**20,
        100 * about["error"],
    )


def write_card(
    config: RunConfig,
    record: RungRecord,
    folder: Path,
    scheduler: StudentScheduler,
    *,
    repository: str | None = None,
) -> None:
    """Writes README.md, and grid.png beside it if the report has one; `repository`: the Hub repository for the snippet."""
    grid = config.run_dir / "report" / GRID
    energy_kept = _energy_kept(folder)
    if grid.is_file() and energy_kept is None:
        write_bytes(folder / GRID, grid.read_bytes())
    files = sorted((folder / "kohya").glob("*.safetensors"))
    card = model_card(
        config,
        record,
        folder,
        scheduler,
        tools=tools_section(config, record, files[0], _facts(config)) if files else None,
        energy_kept=energy_kept,
        repository=repository,
    )
    write_text(folder / "README.md", card)


def _energy_kept(folder: Path) -> float | None:
    """The energy share in kept.json of a lower rank; None for the trained LoRA, ValueError if kept.json is damaged."""
    if not (folder / KEPT).exists():
        return None
    stored = read_sealed(folder / KEPT) or {}
    if not isinstance(stored.get("energy_kept"), float):
        raise ValueError(
            f"{folder / KEPT} is not as it was exported; fix: run `stepdistill export` with --rank again"
        )
    return stored["energy_kept"]


def refresh_cards(config: RunConfig) -> None:
    """Writes the card of every exported rung again, after the run is evaluated."""
    for rung in config.ladder:
        folder = rung_folder(config.run_dir, rung.student_steps)
        if (folder / "scheduler").is_dir():
            record = require_rung(config.run_dir, rung.student_steps)
            write_card(config, record, folder, read_scheduler(folder))


def _write_kohya(
    config: RunConfig,
    record: RungRecord,
    lora: Lora,
    scheduler: StudentScheduler,
    folder: Path,
    identity: dict[str, Any],
    facts: TeacherFacts,
) -> None:
    family, names = kohya.family_of(facts), config.export.kohya_names
    sgm = family == "sdxl" if names == "auto" else names == "sgm"
    name = kohya.kohya_name(config.name, record.student_steps, config.export.rank)
    state = kohya.kohya_state(lora, facts.unet, sgm=sgm, dtype=_dtype(config))
    header = kohya.kohya_header(
        lora,
        family,
        title=name.removesuffix(".safetensors"),
        base_name=config.teacher.path,
        resolution=facts.image_size,
        prediction_type=record.prediction_type,
    )
    if config.export.license is not None:
        header["modelspec.license"] = config.export.license
    header_facts = {
        **{key: value for key, value in dataclasses.asdict(record).items() if key != "training_seconds"},
        "guidance_scale": 1.0,
        "timesteps": trained_timesteps(scheduler, record.student_steps),
        "config_hash": config_hash(config),
        "scheduler": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
        "base": identity,
    }
    about = json.dumps(sealed(header_facts), sort_keys=True, allow_nan=False)
    kohya.write_kohya(folder / "kohya" / name, state, header | {HEADER: about})
    _write_workflow(config, record, folder / "kohya", name, facts)


def _write_workflow(
    config: RunConfig, record: RungRecord, folder: Path, lora: str, facts: TeacherFacts
) -> None:
    """Writes ComfyUI's workflow beside the kohya file; nothing if ComfyUI's noise schedule is not the teacher's, or if its
    U-Net has fewer blocks, which ComfyUI does not know."""
    setting = comfy.setting_of(record, facts.scheduler)
    if setting is None or config.shrink is not None:
        return
    workflow = comfy.workflow(
        setting,
        checkpoint=comfy.model_file_name(config.teacher.path),
        lora=lora,
        teacher_loras=[(comfy.model_file_name(part.path), part.weight) for part in config.teacher.loras],
        size=facts.image_size,
        prompt=config.preview.prompts[0],
        title=lora.removesuffix("_lora.safetensors"),
    )
    write_json(folder / comfy.workflow_name(lora), workflow)


def _dtype(config: RunConfig) -> torch.dtype:
    return getattr(torch, config.export.dtype)
