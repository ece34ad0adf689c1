"""Estimates how many bytes a run will write, from its config and the shapes of its teacher, before it writes any."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.config import Data, RunConfig
from stepdistill.config.evaluation import LATENTS_KEPT
from stepdistill.data.buckets import Sizes, drawn_size
from stepdistill.data.decode import BadSample, read_caption
from stepdistill.data.held_out import settled
from stepdistill.data.prepare import PROMPTS_A_SHARD, SHARD
from stepdistill.data.records import is_cache, is_prompts_only
from stepdistill.data.source import training_records
from stepdistill.demo.world import world_of
from stepdistill.disk.space import png_bytes
from stepdistill.models.adapters import lora_parameters
from stepdistill.models.identity import layer_shapes
from stepdistill.models.network.conditioning import MASK
from stepdistill.models.network.kind import build_network, kind_of_facts
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_headers, weight_files
from stepdistill.teacher.folder import WEIGHTS, missing_parts, teacher_kind, weights_variant
from stepdistill.training.disk_bytes import (
    checkpoints_bytes,
    encoder_parameters,
    preview_images,
    whole_network_bytes,
)

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MAX_COUNTING_SECONDS = 2.0  # for reading the source
_FEATURES = {"": 128, "reader": 96, "pairs_reader": 96, "inception": 2048, "trained": 128}
_MAX_FEATURES = 1536
_LOG_LINE = 600
_PAGE = 20 * 2**20

_OF_A_CHAT = 32
"""More tokens than a chat's template puts around a prompt."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes by their purpose; `checkpoints` are those of one rung, or of a smaller base, which are removed when it is
    finished; `base` is the smaller base, at most as large as the teacher. If `is_whole` is False the sum is a lower bound:
    the source was too long to count in time, or the teacher's weights are not on this disk yet."""

    teacher: int
    cache: int
    rungs: int
    checkpoints: int
    evaluation: int
    report: int
    is_whole: bool
    base: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        made = self.teacher + self.base + self.cache
        return made + self.rungs + self.checkpoints + self.evaluation + self.report


def disk_need(config: RunConfig, teacher: TeacherFacts) -> DiskNeed:
    """The bytes that a run writes into its folder. teacher: facts from the teacher's configs; its weights may be missing."""
    config = settled(config)
    size = drawn_size(config, teacher) or teacher.image_size
    with torch.device("meta"):
        unet = build_network(teacher)
    cache, is_whole = _cache(config.data, teacher)
    pipeline = _pipeline(config, teacher.folder)
    return DiskNeed(
        teacher=pipeline or 0,
        cache=cache,
        rungs=_rungs(config, unet, size),
        checkpoints=_checkpoints(config, unet),
        evaluation=evaluation_bytes(config, teacher),
        report=_report(config, size),
        is_whole=is_whole and pipeline is not None and not (config.shrink and missing_parts(teacher.folder)),
        base=_smaller_base(config, teacher.folder),
    )


def _pipeline(config: RunConfig, folder: Path) -> int | None:
    """Bytes of the pipeline that `prepare` writes into the run's folder; None if its weights are not on this disk yet.

    A single file is written as a pipeline in the file's dtype. A folder or a repository is only written, in float32, if
    LoRAs are merged into it.
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


def _smaller_base(config: RunConfig, folder: Path) -> int:
    """Bytes of the smaller base's pipeline as if it were as large as the teacher's; 0 without one, or if the teacher is not
    on this disk yet."""
    if config.shrink is None or missing_parts(folder):
        return 0
    parts = [(folder / part, stem) for part, stem in WEIGHTS.items() if (folder / part).is_dir()]
    variant = weights_variant(folder)
    return sum(file.stat().st_size for part in parts for file in weight_files(*part, variant))


def _cache(data: Data, teacher: TeacherFacts) -> tuple[int, bool]:
    """Bytes of the cache (a latent for every sample, embeddings for the distinct captions of every shard, each as if it were
    as long as the longest and had a token per byte), and whether all samples were counted."""
    if is_cache(data.source):
        return 0, True  # the shards stay in the other run's folder
    samples, captions, longest, is_whole = _count(data)
    target = Sizes(data, teacher_size=teacher.image_size, multiple=teacher.size_multiple).target
    channels, height, width = teacher.latent_shape(target)
    with torch.device("meta"):
        row = kind_of_facts(teacher).random_conditioning(teacher, 1, dtype=torch.float32)
    stored = {
        name: part.numel() for name, part in row.added_cond_kwargs.items() if name not in ("time_ids", MASK)
    }
    _, tokens, text_width = row.encoder_hidden_states.shape
    if MASK in row.added_cond_kwargs:
        tokens = min(tokens, longest + _OF_A_CHAT)
    embedding = tokens * text_width + sum(stored.values())
    return (samples * channels * height * width + captions * embedding) * _BYTES[data.dtype], is_whole


def _count(data: Data) -> tuple[int, int, int, bool]:
    """Number of samples, number of distinct captions summed over the shards, bytes of the longest caption, and whether all
    samples were counted."""
    a_shard = PROMPTS_A_SHARD if is_prompts_only(data.source) else SHARD
    world = world_of(data.source)
    total = data.num_images if world is None else data.num_images or world.num_images
    repeats = world is not None or is_prompts_only(data.source)  # all shards are alike: count one
    if repeats and total is not None:
        one_shard = data.model_copy(update={"num_images": min(total, a_shard)})
        samples, captions, longest, _ = _walk(one_shard, a_shard)
        return total, round(captions * total / max(samples, 1)), longest, True
    samples, captions, longest, is_whole = _walk(data, a_shard)
    if is_whole or data.num_images is None:
        return samples, captions, longest, is_whole
    return data.num_images, round(captions * data.num_images / samples), longest, True


def _walk(data: Data, a_shard: int) -> tuple[int, int, int, bool]:
    """`_count` by reading records, for at most _MAX_COUNTING_SECONDS."""
    samples, captions, longest, until = 0, 0, 0, time.monotonic() + _MAX_COUNTING_SECONDS
    of_this_shard: set[str] = set()
    for record in training_records(data, seed=0):
        samples += 1
        with contextlib.suppress(BadSample):
            caption = read_caption(record.read_caption())
            of_this_shard.add(caption)
            longest = max(longest, len(caption.encode()))
        if samples % a_shard == 0:
            captions, of_this_shard = captions + len(of_this_shard), set()
        if time.monotonic() > until:
            return samples, captions + len(of_this_shard), longest, False
    return samples, captions + len(of_this_shard), longest, True


def _rungs(config: RunConfig, unet: torch.nn.Module, size: tuple[int, int]) -> int:
    """Bytes of every rung's LoRA in float32, of its exported files and of its previews."""
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
    each += whole if options.quantize == "int8" else 0
    previews = sum(preview_images(config, rung) for rung in config.ladder)
    return len(config.ladder) * each + previews * png_bytes(size)


def _checkpoints(config: RunConfig, unet: torch.nn.Module) -> int:
    """The most bytes that the checkpoints of a rung take while it is trained."""
    lora, encoder = lora_parameters(layer_shapes(unet), config.lora.rank), encoder_parameters(unet)
    rungs = max(checkpoints_bytes(config, rung, parameters=lora, encoder=encoder) for rung in config.ladder)
    if config.shrink is None:
        return rungs
    return max(rungs, whole_network_bytes(config, parameters=sum(p.numel() for p in unet.parameters())))


def evaluation_bytes(config: RunConfig, teacher: TeacherFacts, *, drawn: int = 0) -> int:
    """Bytes of the images of rows, floor and studies, of their features, and of the latents kept for the first of them.

    drawn: number of images that are drawn already; only the share of the others counts.
    """
    options, students = config.evaluation, len(config.ladder)
    size = drawn_size(config, teacher) or teacher.image_size
    rows = len(options.teacher_steps) + len(options.unguided_steps) + students + len(options.loras)
    rows += options.floor
    views = 1 + sum(
        x is not None for x in (options.patch_size, options.clip, options.pickscore, options.dinov2)
    )
    latent = math.prod(teacher.latent_shape(size))
    sweep = students * len(options.lora_scales)
    few = (sweep + students**2 * options.matrix + bool(sweep or options.matrix)) * options.study_images
    few += options.diversity_prompts * options.diversity_seeds * (1 + students + len(options.loras))
    features = views * _FEATURES.get((options.features or "").partition(":")[0], _MAX_FEATURES)
    each_row = options.num_images * (png_bytes(size) + 4 * features)
    latents = min(options.num_images, LATENTS_KEPT) * latent * 4
    whole = rows * (each_row + latents) + few * (png_bytes(size) + latent * 4)
    left = 1 - drawn / max(1, rows * options.num_images + few)
    return round(whole * max(0.0, left))


def _report(config: RunConfig, size: tuple[int, int]) -> int:
    """Bytes of the page with its images, of the image grid beside it, and of the log."""
    options = config.evaluation
    rows = len(options.teacher_steps) + len(config.ladder) + len(options.loras)
    images = 3 * rows * options.grid_columns * png_bytes(size)
    updates = sum(phase.max_train_steps for rung in config.ladder for phase in rung.phases)
    return min(_PAGE, images) + updates * _LOG_LINE
