"""A folder of pictures drawn for one row: written chunk by chunk, resumed where it stopped, read without loading it all.

<folder>/images/000000.png ..    one per prompt
<folder>/chunks/000000.json      a chunk that is whole: how many images, seconds per image
<folder>/latents/000000.safetensors   final latents of that chunk, of the first images only
<folder>/manifest.json           the key of all they depend on; "finished" is set last
"""

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.durable import read_json, write_json

LATENTS_KEPT = 2048  # of the first images: enough for a mean, 0.5 GB at SDXL's 4 x 128 x 128


@dataclass(frozen=True)
class PictureFolder:
    """Pictures 0 .. num_images - 1 under a key; see the legend for the files."""

    path: Path

    def begin(self, key: str, about: dict[str, Any]) -> None:
        """Keeps what is there under this key, removes what another key left, and notes the key."""
        if self.key != key:
            shutil.rmtree(self.path, ignore_errors=True)
            for part in ("images", "chunks", "latents"):
                (self.path / part).mkdir(parents=True)
            write_json(self.path / "manifest.json", {"key": key, **about, "finished": False})

    @property
    def key(self) -> str | None:
        """The key of what is there."""
        manifest = read_json(self.path / "manifest.json")
        return manifest.get("key") if isinstance(manifest, dict) else None

    def missing(self, num_images: int, batch_size: int) -> list[range]:
        """The chunks of `batch_size` with an image that is not there yet."""
        there: set[int] = set()
        for marker in (self.path / "chunks").glob("*.json"):
            record = read_json(marker)
            if record is not None:
                there.update(range(int(marker.stem), int(marker.stem) + record["images"]))
        chunks = [
            range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)
        ]
        return [chunk for chunk in chunks if not there.issuperset(chunk)]

    def add(self, first: int, images: list[Image.Image], latents: torch.Tensor, *, seconds: float) -> None:
        """Pictures first .. first + len(images) - 1, their final latents (n, C, h, w), and the seconds of one."""
        for k, image in enumerate(images):
            image.save(self.path / "images" / f"{first + k:06d}.png", compress_level=1)
        if first < LATENTS_KEPT:
            save_file({"latents": latents.contiguous()}, self.path / "latents" / f"{first:06d}.safetensors")
        write_json(
            self.path / "chunks" / f"{first:06d}.json", {"images": len(images), "seconds_per_image": seconds}
        )

    def finish(self) -> dict[str, Any]:
        """Notes that all is there; returns the manifest, with the median of the chunks' seconds_per_image."""
        manifest: dict[str, Any] = read_json(self.path / "manifest.json") or {}
        if not manifest.get("finished"):
            chunks = [read_json(path) or {} for path in sorted((self.path / "chunks").glob("*.json"))]
            seconds = statistics.median(chunk["seconds_per_image"] for chunk in chunks)
            manifest |= {"finished": True, "seconds_per_image": seconds}
            write_json(self.path / "manifest.json", manifest)
        return manifest

    def batches(self, num_images: int, batch_size: int = 256) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W), in order; as many in memory as a batch has."""
        for start in range(0, num_images, batch_size):
            pixels = [self._pixels(k) for k in range(start, min(start + batch_size, num_images))]
            yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def latents(self) -> torch.Tensor:
        """Final latents (n, C, h, w) of the first images."""
        files = sorted((self.path / "latents").glob("*.safetensors"))
        return torch.cat([load_file(file)["latents"] for file in files])

    def _pixels(self, index: int) -> np.ndarray:
        with Image.open(self.path / "images" / f"{index:06d}.png") as image:
            return np.asarray(image.convert("RGB"))
