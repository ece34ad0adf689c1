"""Latents and text embeddings, made once by `prepare`, read by every phase.

cache/latents.safetensors   latents (N, C, H, W) scaled, prompt_index (N,)
cache/text.safetensors      embeddings of every distinct prompt, and of no prompt
cache/manifest.json         what they were made from, the prompts, and a sha256 of each file
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from stepdistill.config import RunConfig
from stepdistill.data.source import training_pictures
from stepdistill.durable import read_json, sha256_file, sha256_json, write_json
from stepdistill.models.conditioning import Conditioning, encode_prompts, encode_unconditional
from stepdistill.models.folder import resolve_model_folder
from stepdistill.models.loading import fingerprint, image_size, load_pipeline
from stepdistill.rng import derive_seed
from stepdistill.runtime import default_device

logger = logging.getLogger(__name__)
_FILES = ("latents.safetensors", "text.safetensors")


@dataclass(frozen=True)
class LatentCache:
    """latents (N, C, H, W); prompt_index (N,) into conditioning's rows, which belong to `prompts`; unconditional: 1 row."""

    latents: torch.Tensor
    prompt_index: torch.Tensor
    prompts: list[str]
    conditioning: Conditioning
    unconditional: Conditioning

    def __len__(self) -> int:
        return len(self.latents)


def prepare(config: RunConfig) -> bool:
    """Fills the run's cache; False where it was there, made from the same teacher, data and seed."""
    folder = config.run_dir / "cache"
    base = resolve_model_folder(config.teacher.path)
    source = {"teacher": fingerprint(base), "data": config.data.model_dump(), "seed": config.seed}
    key = sha256_json([source, list(config.preview.prompts)])
    manifest = read_json(folder / "manifest.json")
    if manifest is not None and manifest["key"] == key and _intact(folder, manifest):
        return False
    pipeline = load_pipeline(base).to(default_device())
    size = image_size(base)
    prompts, pictures = training_pictures(
        config.data, size=size, seed=derive_seed(config.seed, "data") % 2**32
    )
    distinct = sorted({*prompts, *config.preview.prompts})
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    latents = encode_latents(pipeline, pictures)
    folder.mkdir(parents=True, exist_ok=True)
    prompt_index = torch.tensor([rows[prompt] for prompt in prompts])
    save_file({"latents": latents.contiguous(), "prompt_index": prompt_index}, folder / _FILES[0])
    conditional = encode_prompts(pipeline, distinct, image_size=size)
    unconditional = encode_unconditional(pipeline, image_size=size)
    save_file({**_pack("cond", conditional), **_pack("uncond", unconditional)}, folder / _FILES[1])
    sums = {name: sha256_file(folder / name) for name in _FILES}
    write_json(folder / "manifest.json", {"key": key, **source, "sha256": sums, "prompts": distinct})
    logger.info("cached %d latents %s and %d prompts", len(latents), tuple(latents.shape[1:]), len(distinct))
    return True


def load_cache(config: RunConfig) -> LatentCache:
    """The cache that `prepare` left; ValueError where it is missing or was changed since."""
    folder = config.run_dir / "cache"
    manifest = read_json(folder / "manifest.json")
    if manifest is None or not _intact(folder, manifest):
        raise ValueError(
            f"no intact cache in {folder}: run `stepdistill prepare` (pipelines/prepare.py) first"
        )
    data, text = (load_file(folder / name) for name in _FILES)
    return LatentCache(
        latents=data["latents"],
        prompt_index=data["prompt_index"],
        prompts=manifest["prompts"],
        conditioning=_unpack("cond", text),
        unconditional=_unpack("uncond", text),
    )


@torch.no_grad()
def encode_latents(pipeline: DiffusionPipeline, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """uint8 images (B, 3, H, W) -> scaled posterior means (N, C, h, w), float32; ValueError on a non-finite latent."""
    vae = pipeline.vae
    parts = []
    for batch in batches:
        pixels = (batch.to(vae.device, torch.float32) / 127.5 - 1.0).to(vae.dtype)
        parts.append(vae.encode(pixels).latent_dist.mean.float().cpu() * vae.config.scaling_factor)
    latents = torch.cat(parts)
    bad = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the VAE gives non-finite latents for image {bad[0]} and {len(bad) - 1} more")
    return latents


def _intact(folder: Path, manifest: dict) -> bool:
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == manifest["sha256"][name]
        for name in _FILES
    )


def _pack(prefix: str, conditioning: Conditioning) -> dict[str, torch.Tensor]:
    tensors = {"encoder_hidden_states": conditioning.encoder_hidden_states, **conditioning.added_cond_kwargs}
    return {f"{prefix}.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _unpack(prefix: str, tensors: dict[str, torch.Tensor]) -> Conditioning:
    own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
    return Conditioning(own.pop("encoder_hidden_states"), own)
