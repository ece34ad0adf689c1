"""What a folder of drawn pictures says of itself, chunk by chunk, so that a changed file is noticed. No torch.

<folder>/images/000000.png ..         one per prompt
<folder>/latents/000000.safetensors   final latents of a chunk, of the first images only
<folder>/chunks/000000.json           a chunk that is whole: what it was drawn for, sha256 of its files; written last
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed, sha256_file, write_sealed

_BEFORE = {"images", "seconds_per_image"}
"""Keys of a marker that an earlier version wrote: it tells of no file's sha256."""


@dataclass(frozen=True)
class Chunk:
    """Pictures first .. first + images - 1. `key` hashes what they were drawn with; `pictures` holds the sha256 of their
    files, none in a chunk of an earlier version; `latents` that of the latents' file, None where they are not kept."""

    first: int
    images: int
    seconds_per_image: float
    key: str | None = None
    pictures: tuple[str, ...] = ()
    latents: str | None = None

    @property
    def indices(self) -> range:
        """Numbers of its pictures."""
        return range(self.first, self.first + self.images)

    def write(self, folder: Path) -> None:
        """Writes the chunk's marker."""
        about = {name: value for name, value in asdict(self).items() if name != "first"}
        write_sealed(marker_of(folder, self.first), about)

    def changed_file(self, folder: Path) -> Path | None:
        """The first of its files that is missing or not as it was drawn."""
        written = {
            picture_file(folder, k): digest for k, digest in zip(self.indices, self.pictures, strict=True)
        }
        if self.latents is not None:
            written[latents_file(folder, self.first)] = self.latents
        return next((file for file, digest in written.items() if not is_as_written(file, digest)), None)


def picture_file(folder: Path, index: int) -> Path:
    """images/000000.png."""
    return folder / "images" / f"{index:06d}.png"


def latents_file(folder: Path, first: int) -> Path:
    """latents/000000.safetensors of the chunk that begins there."""
    return folder / "latents" / f"{first:06d}.safetensors"


def marker_of(folder: Path, first: int) -> Path:
    """chunks/000000.json of the chunk that begins there."""
    return folder / "chunks" / f"{first:06d}.json"


def markers(folder: Path) -> list[Path]:
    """The markers of a folder in order of their pictures, damaged ones too."""
    return sorted(path for path in (folder / "chunks").glob("*.json") if path.stem.isdecimal())


def read_chunk(marker: Path) -> Chunk | None:
    """The chunk that a marker tells of; None where it is damaged."""
    raw = read_sealed(marker)
    if raw is None or not raw.keys() >= _BEFORE:
        return None
    images, seconds = raw["images"], raw["seconds_per_image"]
    if type(images) is not int or images < 1 or type(seconds) not in (int, float):
        return None
    if raw.keys() == _BEFORE:
        return Chunk(int(marker.stem), images, seconds)
    try:
        chunk = Chunk(int(marker.stem), images, seconds, raw["key"], tuple(raw["pictures"]), raw["latents"])
    except (KeyError, TypeError):
        return None
    return chunk if len(chunk.pictures) == images else None


def chunks_of(folder: Path) -> Iterator[Chunk]:
    """The chunks of a folder in order, those with a damaged marker left out."""
    for marker in markers(folder):
        chunk = read_chunk(marker)
        if chunk is not None:
            yield chunk


def picture_digest(folder: Path, index: int) -> str | None:
    """sha256 of a picture's file as it was drawn; None where nothing is said of it."""
    before = [marker for marker in markers(folder) if int(marker.stem) <= index]
    chunk = read_chunk(before[-1]) if before else None
    is_recorded = chunk is not None and index in chunk.indices and chunk.pictures
    return chunk.pictures[index - chunk.first] if chunk is not None and is_recorded else None


def is_as_written(file: Path, digest: Any) -> bool:
    """Whether a file is there and has this sha256."""
    try:
        return file.is_file() and sha256_file(file) == digest
    except OSError:
        return False
