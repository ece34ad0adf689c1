"""How many bytes a run writes, counted from its config and its teacher's shapes before any of it is written."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import Data, RunConfig
from stepdistill.data.buckets import Sizes
from stepdistill.data.held_out import settled
from stepdistill.data.prepare import PROMPTS_A_SHARD, SHARD
from stepdistill.data.records import is_cache, is_prompts_only
from stepdistill.data.samples import BadSample, read_caption
from stepdistill.data.source import training_records
from stepdistill.demo.world import world_of
from stepdistill.evaluation.draw.picture_folder import LATENTS_KEPT
from stepdistill.models.adapters import lora_parameters
from stepdistill.models.identity import layer_shapes
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_headers, weight_files
from stepdistill.teacher.folder import WEIGHTS, missing_parts, teacher_kind, weights_variant

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = 4096  # what a small file takes on the disk
_PNG = 0.7  # of three bytes a pixel; photographs, packed fast
_SECONDS = 2.0  # of looking at the source
_FEATURES = {"": 128, "reader": 96, "inception": 2048, "trained": 128}
_MOST_FEATURES = 1536
_LOG_LINE = 600
_PAGE = 20 * 2**20


@dataclass(frozen=True)
class DiskNeed:
    """Bytes by what they are for. `is_whole` is False where the source was too long to be counted to its end."""

    teacher: int
    cache: int
    rungs: int
    evaluation: int
    report: int
    is_whole: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.teacher + self.cache + self.rungs + self.evaluation + self.report


def disk_need(config: RunConfig, teacher: TeacherFacts) -> DiskNeed:
    """What a run writes into its folder. teacher: what the teacher's configs say; its weights may lie beside them or not."""
    config, size = settled(config), teacher.image_size
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(str(teacher.folder / "unet"))
        )
    cache, is_whole = _cache(config.data, teacher)
    pipeline = _pipeline(config, teacher.folder)
    return DiskNeed(
        teacher=pipeline or 0,
        cache=cache,
        rungs=_rungs(config, unet, size),
        evaluation=_evaluation(config, teacher),
        report=_report(config, size),
        is_whole=is_whole and pipeline is not None,
    )


def folder_bytes(folder: Path) -> int:
    """What lies in a folder, links not followed; 0 where there is none."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _pipeline(config: RunConfig, folder: Path) -> int | None:
    """Bytes of the pipeline that `prepare` writes into the run's folder; None where its weights are not on this disk yet.

    A file's is in the file's dtype. A folder's or a repository's is written where LoRAs go into it, in float32.
    """
    if teacher_kind(config.teacher.path) == "file":
        return Path(config.teacher.path).expanduser().stat().st_size
    if not config.teacher.loras:
        return 0
    if missing_parts(folder):
        return None
    variant = weights_variant(folder)
    parts = [(folder / part, stem) for part, stem in WEIGHTS.items() if (folder / part).is_dir()]
    shapes = [shape for part in parts for _, shape in read_headers(weight_files(*part, variant)).values()]
    return 4 * sum(map(math.prod, shapes))


def _cache(data: Data, teacher: TeacherFacts) -> tuple[int, bool]:
    """Latents of every sample, and embeddings of the distinct captions of every shard."""
    if is_cache(data.source):
        return 0, True  # the lender's
    samples, captions, is_whole = _count(data)
    target = Sizes(data, teacher_size=teacher.image_size, multiple=teacher.size_multiple).target
    channels, height, width = teacher.latent_shape(target)
    text, second = (teacher.configs[name] for name in ("text_encoder", "text_encoder_2"))
    embedding = int(text.get("max_position_embeddings", 77)) * int(
        teacher.unet.get("cross_attention_dim", 768)
    )
    embedding += int(second.get("projection_dim", 0))
    return (samples * channels * height * width + captions * embedding) * _BYTES[data.dtype], is_whole


def _count(data: Data) -> tuple[int, int, bool]:
    """Samples, distinct captions summed over the shards, and whether that is all of them."""
    a_shard = PROMPTS_A_SHARD if is_prompts_only(data.source) else SHARD
    world = world_of(data.source)
    total = data.num_images if world is None else data.num_images or world.num_images
    repeats = world is not None or is_prompts_only(data.source)  # one shard is as the others
    if repeats and total is not None:
        looked_at = data.model_copy(update={"num_images": min(total, a_shard)})
        samples, captions, _ = _walk(looked_at, a_shard)
        return total, round(captions * total / max(samples, 1)), True
    samples, captions, is_whole = _walk(data, a_shard)
    if is_whole or data.num_images is None:
        return samples, captions, is_whole
    return data.num_images, round(captions * data.num_images / samples), True


def _walk(data: Data, a_shard: int) -> tuple[int, int, bool]:
    """`_count` of the records that can be looked at in time."""
    samples, captions, until = 0, 0, time.monotonic() + _SECONDS
    here: set[str] = set()
    for record in training_records(data, seed=0):
        samples += 1
        with contextlib.suppress(BadSample):
            here.add(read_caption(record.read_caption()))
        if samples % a_shard == 0:
            captions, here = captions + len(here), set()
        if time.monotonic() > until:
            return samples, captions + len(here), False
    return samples, captions + len(here), True


def _rungs(config: RunConfig, unet: torch.nn.Module, size: tuple[int, int]) -> int:
    """Every rung's LoRA in float32, what export makes of it, and its previews."""
    lora = lora_parameters(layer_shapes(unet), config.lora.rank)
    whole = sum(parameter.numel() for parameter in unet.parameters())
    options = config.export
    other = {
        "diffusers": 0,
        "kohya": lora * _BYTES[options.dtype],
        "fused": whole * _BYTES[options.dtype],
        "onnx": whole * _BYTES["float32"],
    }
    each = lora * _BYTES["float32"] + sum(other[name] for name in options.formats)
    every = config.training.preview_steps
    drawn = sum(
        1 + (phase.max_train_steps // every if every else 0)
        for rung in config.ladder
        for phase in rung.phases
    )
    return len(config.ladder) * each + drawn * 2 * len(config.preview.prompts) * _picture(size)


def _evaluation(config: RunConfig, teacher: TeacherFacts) -> int:
    """Pictures, their features, and final latents of the first of them: of rows, floor and studies."""
    options, students, size = config.evaluation, len(config.ladder), teacher.image_size
    rows = len(options.teacher_steps) + len(options.unguided_steps) + students + len(options.loras)
    rows += options.floor
    views = 1 + sum(x is not None for x in (options.patch_size, options.clip, options.dinov2))
    latent = math.prod(teacher.latent_shape(size))
    sweep = students * len(options.lora_scales)
    few = (sweep + students**2 * options.matrix + bool(sweep or options.matrix)) * options.study_images
    few += options.diversity_prompts * options.diversity_seeds * (1 + students + len(options.loras))
    features = views * _FEATURES.get((options.features or "").partition(":")[0], _MOST_FEATURES)
    each_row = options.num_images * (_picture(size) + 4 * features)
    latents = min(options.num_images, LATENTS_KEPT) * latent * 4
    return rows * (each_row + latents) + few * (_picture(size) + latent * 4)


def _report(config: RunConfig, size: tuple[int, int]) -> int:
    """The page with its pictures, the sheet beside it, and the log."""
    options = config.evaluation
    rows = len(options.teacher_steps) + len(config.ladder) + len(options.loras)
    pictures = 3 * rows * options.grid_columns * _picture(size)
    updates = sum(phase.max_train_steps for rung in config.ladder for phase in rung.phases)
    return min(_PAGE, pictures) + updates * _LOG_LINE


def _picture(size: tuple[int, int]) -> int:
    """A PNG of height and width in pixels."""
    packed = round(size[0] * size[1] * 3 * _PNG)
    return -(-packed // _BLOCK) * _BLOCK
