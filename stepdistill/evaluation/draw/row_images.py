"""A folder of images drawn for one row: written chunk by chunk, resumable, and read in batches.

images/, latents/, chunks/   images, final latents, and markers of complete chunks (run/image_chunks.py)
manifest.json                the key, a hash of everything the images depend on; "finished" is set last

A chunk with a missing or changed file is drawn again.
"""

import hashlib
import shutil
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from stepdistill.config.evaluation import LATENTS_KEPT
from stepdistill.disk.durable import (
    image_bytes,
    read_sealed,
    sha256_file,
    warn_of_damage,
    write_sealed,
    writing,
)
from stepdistill.disk.guarded_folder import make_folder
from stepdistill.run.image_chunks import (
    Chunk,
    chunks_of,
    image_file,
    latents_file,
    markers,
    read_chunk,
)

_UNREADABLE = (OSError, ValueError, SyntaxError, KeyError, SafetensorError, Image.DecompressionBombError)


@dataclass(frozen=True)
class RowImages:
    """Images 0 .. num_images - 1 that were drawn under one key; the legend above lists the files."""

    path: Path

    def begin(self, key: str, about: dict[str, Any]) -> None:
        """Prepares the folder for images of `key`: keeps those of this key, removes any others, writes the manifest.

        If the manifest is damaged, the chunks stay if any of them has this key; `drop_damaged` checks each chunk's key.
        """
        manifest = read_sealed(self.path / "manifest.json")
        if manifest is not None and manifest.get("key") == key:
            return
        with writing(self.path):
            if manifest is None and (self.path / "manifest.json").exists():
                warn_of_damage(self.path / "manifest.json", "it is written again")
            if manifest is not None or not any(chunk.key == key for chunk in chunks_of(self.path)):
                shutil.rmtree(self.path, ignore_errors=True)
            for part in ("images", "chunks", "latents"):
                make_folder(self.path / part)
        write_sealed(self.path / "manifest.json", {"key": key, **about, "finished": False})

    @property
    def key(self) -> str | None:
        """The key in the manifest; None if there is no intact manifest."""
        return (read_sealed(self.path / "manifest.json") or {}).get("key")

    def markers(self) -> list[Path]:
        """The markers of the folder's chunks, for `drop_damaged`."""
        return markers(self.path)

    def drop_damaged(self, several: Iterable[Path]) -> None:
        """Removes the markers of chunks that are damaged or have another key, so that their images count as missing.

        A chunk written by an earlier version has no sha256; it is accepted if its files can be read.
        """
        key = self.key
        for marker in several:
            damaged = self._damaged(marker, key)
            if damaged is not None:
                warn_of_damage(damaged, "its images are drawn again")
                with writing(marker):
                    marker.unlink()

    def _damaged(self, marker: Path, key: str | None) -> Path | None:
        """The first missing or changed file of a chunk; the marker if that is damaged or has another key; else None."""
        chunk = read_chunk(marker)
        if chunk is not None and chunk.key is None:
            return self._adopt(chunk)
        return marker if chunk is None or chunk.key != key else chunk.changed_file(self.path)

    def missing(self, num_images: int, batch_size: int) -> list[range]:
        """The numbers of the missing images, in ranges of at most `batch_size`."""
        present = {index for chunk in chunks_of(self.path) for index in chunk.indices}
        runs: list[range] = []
        for index in (k for k in range(num_images) if k not in present):
            if runs and runs[-1].stop == index and index % batch_size:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        return runs

    def add(self, first: int, images: list[Image.Image], latents: torch.Tensor, *, seconds: float) -> None:
        """Writes images first .. first + len(images) - 1 and their final latents (n, C, h, w); seconds: time per image."""
        digests = tuple(
            _written(image_file(self.path, first + k), image_bytes(image, compress_level=1))
            for k, image in enumerate(images)
        )
        latents_sha256 = None
        if first < LATENTS_KEPT:
            content = save({"latents": latents.contiguous()})
            latents_sha256 = _written(latents_file(self.path, first), content)
        Chunk(first, len(images), seconds, self.key, digests, latents_sha256).write(self.path)

    def finish(self) -> dict[str, Any]:
        """Marks the folder as complete; returns the manifest, with the median of the chunks' seconds_per_image."""
        before = read_sealed(self.path / "manifest.json") or {}
        seconds = statistics.median(chunk.seconds_per_image for chunk in chunks_of(self.path))
        manifest = before | {"finished": True, "seconds_per_image": seconds}
        if manifest != before:
            write_sealed(self.path / "manifest.json", manifest)
        return manifest

    def batches(self, num_images: int, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W), in order, one batch in memory at a time; ValueError if an image cannot be read."""
        for start in range(0, num_images, batch_size):
            pixels = [self._pixels(k) for k in range(start, min(start + batch_size, num_images))]
            yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def latents(self) -> torch.Tensor:
        """Final latents (n, C, h, w) of the first LATENTS_KEPT images or fewer; ValueError if a file cannot be read."""
        parts, end = [], 0
        for chunk in chunks_of(self.path):
            if chunk.latents is not None:  # chunks of an earlier version may overlap
                parts.append(_read_latents(latents_file(self.path, chunk.first))[max(0, end - chunk.first) :])
                end = max(end, chunk.indices.stop)
        return torch.cat(parts)[:LATENTS_KEPT]

    def _pixels(self, index: int) -> np.ndarray:
        file = image_file(self.path, index)
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))
        except _UNREADABLE as error:
            raise ValueError(_cannot_read(file, error)) from None

    def _adopt(self, chunk: Chunk) -> Path | None:
        """Adds key and sha256 to a chunk of an earlier version; returns the file that cannot be read, if there is one."""
        for index in chunk.indices:
            try:
                self._pixels(index)
            except ValueError:
                return image_file(self.path, index)
        latents, digest = latents_file(self.path, chunk.first), None
        if chunk.first < LATENTS_KEPT:
            try:
                digest = sha256_file(latents) if len(_read_latents(latents)) == chunk.images else None
            except (OSError, ValueError):
                digest = None
            if digest is None:
                return latents
        digests = tuple(sha256_file(image_file(self.path, k)) for k in chunk.indices)
        replace(chunk, key=self.key, digests=digests, latents=digest).write(self.path)
        return None


def _read_latents(file: Path) -> torch.Tensor:
    try:
        return load_file(file)["latents"]
    except _UNREADABLE as error:
        raise ValueError(_cannot_read(file, error)) from None


def _cannot_read(file: Path, error: Exception) -> str:
    return f"cannot read {file}: {' '.join(str(error).split())}; fix: run the same command again, which draws it anew"


def _written(file: Path, content: bytes) -> str:
    """Writes a file, not atomically, as it counts only after its chunk's marker is written; returns its sha256."""
    with writing(file):
        file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
