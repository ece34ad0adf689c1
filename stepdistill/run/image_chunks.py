"""A folder of drawn images records the sha256 of its files chunk by chunk, so that a changed file is noticed. No torch.

<folder>/images/000000.png ..         one per prompt
<folder>/latents/000000.safetensors   final latents of a chunk, of the first images only
<folder>/chunks/000000.json           marker of a complete chunk: key, sha256 of each of its files; written last
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed, sha256_file, write_sealed

_EARLIER_KEYS = {"images", "seconds_per_image"}
"""Keys of a marker that an earlier version wrote; such a marker holds no sha256."""


@dataclass(frozen=True)
class Chunk:
    """Images number first .. first + images - 1.

    key       hash of all that the images depend on
    digests   sha256 of each image's file; empty in a chunk of an earlier version
    latents   sha256 of the latents' file; None if the chunk's latents are not kept
    """

    first: int
    images: int
    seconds_per_image: float
    key: str | None = None
    digests: tuple[str, ...] = ()
    latents: str | None = None

    @property
    def indices(self) -> range:
        """The numbers of the chunk's images."""
        return range(self.first, self.first + self.images)

    def write(self, folder: Path) -> None:
        """Writes the chunk's marker."""
        about = {name: value for name, value in asdict(self).items() if name not in ("first", "digests")}
        write_sealed(marker_of(folder, self.first), about | {"pictures": self.digests})

    def changed_file(self, folder: Path) -> Path | None:
        """The first of the chunk's files that is missing or changed; None if all are intact."""
        written = {
            image_file(folder, k): digest for k, digest in zip(self.indices, self.digests, strict=True)
        }
        if self.latents is not None:
            written[latents_file(folder, self.first)] = self.latents
        return next((file for file, digest in written.items() if not is_as_written(file, digest)), None)


def image_file(folder: Path, index: int) -> Path:
    """The file of an image, images/000000.png."""
    return folder / "images" / f"{index:06d}.png"


def latents_file(folder: Path, first: int) -> Path:
    """latents/000000.safetensors of the chunk whose first image has this number."""
    return folder / "latents" / f"{first:06d}.safetensors"


def marker_of(folder: Path, first: int) -> Path:
    """chunks/000000.json of the chunk whose first image has this number."""
    return folder / "chunks" / f"{first:06d}.json"


def markers(folder: Path) -> list[Path]:
    """All markers of a folder in the order of their images, damaged ones included."""
    return sorted(path for path in (folder / "chunks").glob("*.json") if path.stem.isdecimal())


def read_chunk(marker: Path) -> Chunk | None:
    """The chunk that a marker describes; None if the marker is damaged."""
    raw = read_sealed(marker)
    if raw is None or not raw.keys() >= _EARLIER_KEYS:
        return None
    images, seconds = raw["images"], raw["seconds_per_image"]
    if type(images) is not int or images < 1 or type(seconds) not in (int, float):
        return None
    if raw.keys() == _EARLIER_KEYS:
        return Chunk(int(marker.stem), images, seconds)
    try:
        chunk = Chunk(int(marker.stem), images, seconds, raw["key"], tuple(raw["pictures"]), raw["latents"])
    except (KeyError, TypeError):
        return None
    return chunk if len(chunk.digests) == images else None


def chunks_of(folder: Path) -> Iterator[Chunk]:
    """The chunks of a folder in order; those with a damaged marker are left out."""
    for marker in markers(folder):
        chunk = read_chunk(marker)
        if chunk is not None:
            yield chunk


def image_digest(folder: Path, index: int) -> str | None:
    """The sha256 that was recorded for an image's file when it was drawn; None if there is no record."""
    before = [marker for marker in markers(folder) if int(marker.stem) <= index]
    chunk = read_chunk(before[-1]) if before else None
    is_recorded = chunk is not None and index in chunk.indices and chunk.digests
    return chunk.digests[index - chunk.first] if chunk is not None and is_recorded else None


def is_as_written(file: Path, digest: Any) -> bool:
    """Whether a file exists and has this sha256."""
    try:
        return file.is_file() and sha256_file(file) == digest
    except OSError:
        return False
