"""The cache that `prepare` writes and every phase reads: memory-mapped shards of latents and text embeddings.

cache/shards/00000.safetensors   consecutive samples (shards.py)
cache/text.safetensors           embeddings of the preview's prompts, and the unconditional embedding
cache/manifest.json              what the cache was made from, its shards, how many samples were bad and why; written last
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stepdistill import rng
from stepdistill.config import RunConfig
from stepdistill.data.order import samples_of_update
from stepdistill.data.shards import Places, Shard, Size, is_intact, read_about
from stepdistill.disk.durable import read_sealed, sha256_file
from stepdistill.errors import DataError
from stepdistill.models.network.conditioning import MASK, Conditioning

TEXT = "text.safetensors"


@dataclass(frozen=True)
class CachedSamples:
    """latents (B, C, h, w) in float32, and their conditioning (B rows)."""

    latents: torch.Tensor
    conditioning: Conditioning


class LatentCache:
    """Reads the samples of a cache by their number.

    Args:
        shards: in the order of their samples.
        prompts: the preview's prompts.
        conditioning: one row for each of these prompts.
        unconditional: one row, the unconditional embedding of classifier-free guidance.
        has_captions: the conditioning has its captions.
    """

    def __init__(
        self,
        shards: list[Shard],
        *,
        prompts: list[str],
        conditioning: Conditioning,
        unconditional: Conditioning,
        has_captions: bool = False,
    ) -> None:
        self._shards, self._prompts, self._has_captions = shards, prompts, has_captions
        self._conditioning = replace(conditioning, captions=tuple(prompts)) if has_captions else conditioning
        self.unconditional = unconditional
        sizes = sorted({size for shard in shards for size in shard.counts})
        self._places = {size: Places([shard.counts.get(size, 0) for shard in shards]) for size in sizes}
        self.sizes: dict[Size, int] = {size: len(places) for size, places in self._places.items()}
        """Number of samples of each size (height, width) in pixels."""

    def __len__(self) -> int:
        return sum(self.sizes.values())

    @functools.cached_property
    def latent_shapes(self) -> dict[Size, tuple[int, ...]]:
        """Latent shape (C, h, w) of each size."""
        return {
            size: next(s for s in self._shards if s.counts.get(size)).latent_shape(size)
            for size in self.sizes
        }

    @property
    def commonest_size(self) -> Size:
        """The size (height, width) in pixels that the most samples have."""
        return max(self.sizes, key=lambda size: self.sizes[size])

    @property
    def smallest_side(self) -> int:
        """The smallest height or width of any latent."""
        return min(min(shape[1:]) for shape in self.latent_shapes.values())

    @property
    def sizes_vary(self) -> bool:
        """Whether updates have images of several sizes, or texts of several lengths."""
        return len(self.latent_shapes) > 1 or MASK in self.unconditional.added_cond_kwargs

    def captions(self) -> set[str]:
        """The distinct captions of all samples."""
        return {caption for shard in self._shards for caption in shard.captions}

    def of_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of these prompts, one row each; ValueError if one is not a prompt of the preview."""
        return self._conditioning.rows(torch.tensor([self._prompts.index(prompt) for prompt in prompts]))

    def samples(self, size: Size, numbers: list[int]) -> CachedSamples:
        """Samples of one size, in the order of `numbers`, which count the samples of that size only."""
        shards, index = self._places[size].find(torch.tensor(numbers))
        order = torch.argsort(shards, stable=True)
        latents, conditionings = [], []
        for shard in shards.unique().tolist():
            here = index[order][shards[order] == shard]
            latents.append(self._shards[shard].latents(size, here))
            conditionings.append(
                self._shards[shard].conditioning(size, here, has_captions=self._has_captions)
            )
        back = torch.argsort(order)
        conditioning = functools.reduce(Conditioning.concat, conditionings).rows(back).cut()
        return CachedSamples(torch.cat(latents)[back].float(), conditioning)

    def draw(self, indices: list[int], *, seed: int, group: int) -> CachedSamples:
        """The samples of the global `indices`, all of one size: shuffled passes over the data, no sample twice in a pass.

        With several sizes, an update (`group` consecutive indices) has samples of one size (order.py); ValueError if the
        indices belong to more than one update.
        """
        if not all(self.sizes.values()) or not self.sizes:
            raise DataError("the cache holds no samples; fix: `stepdistill prepare` with data that has some")
        if len(self.sizes) == 1:
            size, count = next(iter(self.sizes.items()))
            return self.samples(size, rng.dataset_rows(indices, size=count, seed=seed))
        if len({index // group for index in indices}) > 1:
            raise ValueError("samples of several updates may be of several sizes: ask for one update's")
        size, numbers = samples_of_update(self.sizes, indices[0] // group, group=group, seed=seed)
        return self.samples(size, [numbers[index % group] for index in indices])


def load_cache(config: RunConfig) -> LatentCache:
    """Opens the run's cache; ValueError if it is missing or a byte of it changed since `prepare` wrote it."""
    return open_cache(config.run_dir / "cache", has_captions=bool(config.teachers))


def open_cache(folder: Path, *, has_captions: bool = False) -> LatentCache:
    """Opens the cache in `folder`; ValueError if it is missing or a byte of it changed since `prepare` wrote it.

    has_captions: the conditioning of its samples has their captions.
    """
    manifest = read_sealed(folder / "manifest.json")
    broken = _broken(folder, manifest)
    if manifest is None or broken is not None:
        raise DataError(
            f"no intact cache in {folder} ({broken}): run `stepdistill prepare` (pipelines/prepare.py) first"
        )
    text = load_file(folder / TEXT)
    return LatentCache(
        [Shard(folder / entry["file"]) for entry in manifest["shards"]],
        prompts=manifest["prompts"],
        conditioning=_unpack("cond", text),
        unconditional=_unpack("uncond", text),
        has_captions=has_captions,
    )


def is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has all entries that opening a cache needs, with the right types."""
    entries = manifest.get("shards")
    prompts, samples = manifest.get("prompts"), manifest.get("samples", 0)
    return (
        isinstance(entries, list)
        and all(isinstance(entry, dict) and isinstance(entry.get("file"), str) for entry in entries)
        and isinstance(prompts, list)
        and type(samples) is int
    )


def _broken(folder: Path, manifest: dict[str, Any] | None) -> str | None:
    """The first file that is missing or was changed, as part of a message; None if the cache is intact."""
    if manifest is None or not is_whole(manifest):
        exists = (folder / "manifest.json").exists()
        return "manifest.json is not as it was written" if exists else "no manifest.json"
    if not (folder / TEXT).is_file() or sha256_file(folder / TEXT) != manifest.get("text_sha256"):
        return f"{TEXT} is missing or changed"
    for entry in manifest["shards"]:
        about = read_about(folder / entry["file"])
        if (
            about is None
            or about.get("sha256") != entry.get("sha256")
            or not is_intact(folder / entry["file"])
        ):
            return f"{entry['file']} is missing or changed"
    return None


def pack(prefix: str, conditioning: Conditioning) -> dict[str, torch.Tensor]:
    """Conditioning as tensors named PREFIX.NAME, to be written to a file."""
    tensors = {"encoder_hidden_states": conditioning.encoder_hidden_states, **conditioning.added_cond_kwargs}
    return {f"{prefix}.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _unpack(prefix: str, tensors: dict[str, torch.Tensor]) -> Conditioning:
    inputs = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
    return Conditioning(inputs.pop("encoder_hidden_states"), inputs)
