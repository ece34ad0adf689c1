"""What all rungs of a run share: network, data, undistilled teacher, processes."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.config import ConfigError, RunConfig
from stepdistill.data.buckets import Size, drawn_size, scheduler_of
from stepdistill.data.cache import LatentCache, load_cache
from stepdistill.diffusion.noise_path import NoisePath
from stepdistill.disk.durable import read_sealed, sha256_json
from stepdistill.ladder.base_network import load_base
from stepdistill.models.attention import log_attention
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.experts import with_experts
from stepdistill.models.shared_network import SharedNetwork
from stepdistill.plan.budget import Keeps, kept_modules
from stepdistill.rng import derive_seed
from stepdistill.run.rung_order import begun_from
from stepdistill.run.rungs import read_record
from stepdistill.run.settings import settings_behind
from stepdistill.runtime import Runtime, environment, release_memory
from stepdistill.teacher.experts import check_prompts, teachers_key
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import fingerprint, load_noise_path, load_vae, vae_dtype
from stepdistill.teacher.source import teacher_folder
from stepdistill.training.checkpoint import Identity
from stepdistill.training.measure_looks import PhaseLooks
from stepdistill.training.painter import Painter
from stepdistill.training.preview import MAX_TEACHER_STEPS
from stepdistill.training.trackers import Trackers

_VERSIONS = ("commit", "python", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class Shared:
    """Objects that all rungs of a run share.

    base            the folder of the teacher's pipeline
    network         the base U-Net with the adapters of student and teacher
    undistilled     the first rung's teacher: the base model with guidance and without an adapter, or several on it
    cache           latents and text embeddings
    painter         draws images with a denoiser during training
    trackers        get the numbers of every update; None in processes that write no files
    keeps           the modules whose activations are kept under training.memory_budget
    looks           measures sharpness, contrast and colour at the end of each phase
    """

    config: RunConfig
    base: Path
    network: SharedNetwork
    undistilled: Denoiser
    cache: LatentCache
    painter: Painter
    looks: PhaseLooks
    runtime: Runtime
    trackers: Trackers | None
    keeps: Keeps

    @functools.cached_property
    def base_fingerprint(self) -> str:
        """Identifies the base model."""
        return fingerprint(self.base)

    @functools.cached_property
    def image_size(self) -> Size | None:
        """Height and width in pixels that a pipeline must be asked for; None if its own default is right."""
        return drawn_size(self.config, TeacherFacts.of_folder(self.base))

    @functools.cached_property
    def _cache_hash(self) -> str:
        return cache_hash(self.config)

    @property
    def samples_per_update(self) -> int:
        """Number of samples of an update, over all processes."""
        training = self.config.training
        return training.train_batch_size * training.gradient_accumulation_steps * self.runtime.num_processes

    def identity(self, position: int, phase: int, step: int) -> Identity:
        """What the state of rung number `position` after `step` updates of phase number `phase` belongs to."""
        config = self.config
        earlier = [
            (r.student_steps, read_record(config.run_dir, r.student_steps)) for r in config.ladder[:position]
        ]
        rungs = {str(steps): record.sha256 for steps, record in earlier if record is not None}
        if config.teachers:
            rungs["teachers"] = str(teachers_key(config))
        if config.ladder[position].init is not None:
            rungs["init"] = str(begun_from(config, config.ladder[position]))
        return Identity(
            settings=settings_behind(config, position=position, phase=phase, step=step),
            rungs=rungs,
            base=self.base_fingerprint,
            cache=self._cache_hash,
            samples=self.samples_per_update,
            versions=versions_of_training(),
        )

    @property
    def noise_path(self) -> NoisePath:
        """The noise path of the base model."""
        return self.undistilled.noise_path


@functools.cache
def versions_of_training() -> dict[str, str]:
    """Versions of this package and those it uses, as they were when this process began to train."""
    versions = environment()
    return {name: str(versions[name]) for name in _VERSIONS}


def cache_hash(config: RunConfig) -> str:
    """A hash of the shards of a run's latents and text embeddings."""
    manifest = read_sealed(config.run_dir / "cache" / "manifest.json") or {}
    return sha256_json(manifest.get("shards"))


def load_shared(config: RunConfig, runtime: Runtime) -> Shared:
    """Loads the shared network, the cache and all else that every rung needs, after freeing models of earlier stages."""
    _check_compiling(config, runtime)
    release_memory()
    base = teacher_folder(config)
    facts = TeacherFacts.of_folder(base)
    keeps = kept_modules(config, facts)
    cache = load_cache(config)
    network = _load_network(base, config, runtime, sizes_vary=cache.sizes_vary)
    noise_path, prediction_type = load_noise_path(scheduler_of(config, facts))
    check_prompts(config.teachers, cache.captions() if config.teachers else ())
    undistilled = with_experts(
        Denoiser(
            network,
            None,
            noise_path.to(runtime.device),
            prediction_type,
            guidance_scale=config.teacher.guidance_scale,
            unconditional=cache.unconditional.to(runtime.device, runtime.weight_dtype),
        ),
        config,
    )
    painter = Painter(
        load_vae(base, dtype=vae_dtype(facts, runtime.weight_dtype)),
        batch_size=config.training.train_batch_size,
    )
    looks = PhaseLooks(
        painter,
        cache,
        undistilled,
        teacher_steps=min(config.evaluation.teacher_steps[0], MAX_TEACHER_STEPS),
        images=config.preview.looks_images,
        seed=config.seed,
    )
    trackers = Trackers(config) if runtime.is_main else None
    return Shared(config, base, network, undistilled, cache, painter, looks, runtime, trackers, keeps)


def _load_network(base: Path, config: RunConfig, runtime: Runtime, *, sizes_vary: bool) -> SharedNetwork:
    unet = load_base(base, config, runtime)
    if runtime.is_main:
        log_attention(unet, dtype=runtime.weight_dtype, device=runtime.device)
    return SharedNetwork.with_student_and_teacher(
        unet,
        rank=config.lora.rank,
        seed=derive_seed(config.seed, "lora"),
        gradient_checkpointing=config.training.gradient_checkpointing,
        compiles=config.training.compile,
        sizes_vary=sizes_vary,
    )


def _check_compiling(config: RunConfig, runtime: Runtime) -> None:
    """ConfigError for half precision compiled for a CPU: torch 2.13's vector code for some processors gives NaN in the
    backward pass of residual blocks, and its scalar code does not."""
    if config.training.compile and runtime.device.type == "cpu" and runtime.weight_dtype != torch.float32:
        raise ConfigError(
            f"training.compile: got true with mixed_precision {config.training.mixed_precision} on a CPU, where torch's "
            f"compiled code gives NaN on some processors; fix: training.mixed_precision=no, or training.compile=false"
        )
