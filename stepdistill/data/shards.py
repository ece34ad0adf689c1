"""One shard of a cache: latents and text embeddings of consecutive samples in one safetensors file, memory-mapped.

latents/HxW                 (n, C, h, w), latents of the images cropped to H x W pixels, scaled (images/latents.py)
rows/HxW                    (n, 5) int32: row of the caption; height, width of the whole image; top, left of the crop
text/encoder_hidden_states  (m, tokens, width), text/text_embeds or text/pooled_projections (m, width): embeddings of the m
                            distinct captions
text/attention_mask         (m, tokens) uint8, of texts of different lengths: 0 at the zeros that fill a row up
captions                    the m captions, as the bytes of a JSON list
header                      what the shard was made from, how many samples were bad and why, sha256 of everything else
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save

from stepdistill.disk.durable import write_bytes
from stepdistill.errors import DataError
from stepdistill.models.network.conditioning import MASK, Conditioning

FORMAT = "stepdistill cache 2"
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
Size = tuple[int, int]


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> str:
    """Writes a shard atomically and returns its sha256; equal tensors and `about` give equal bytes. ValueError if writing
    fails."""
    header, body = _split(save(dict(tensors)))
    header["__metadata__"] = {"format": FORMAT, **about}
    sums = _header_sum(header)
    sums.update(body)
    digest = header["__metadata__"]["sha256"] = sums.hexdigest()
    text = _text(header)
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little") + text, body)
    return digest


def read_about(path: Path) -> dict[str, str] | None:
    """The metadata in a shard's header; None if the file is not a shard of this format or has the wrong length."""
    try:
        header, start = _read_header(path)
        about = header["__metadata__"]
        right = about["format"] == FORMAT and all(isinstance(text, str) for text in about.values())
        right = right and _is_sound(header, path.stat().st_size - start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return about if right else None


def _is_sound(header: dict, size: int) -> bool:
    """Whether a header describes tensors that lie within `size` bytes, and the parts that every sample needs. ValueError,
    KeyError, TypeError or AttributeError if the header has other parts."""
    tensors = {name: part for name, part in header.items() if name != "__metadata__"}
    ends = []
    for part in tensors.values():
        shape, (begin, end) = part["shape"], part["data_offsets"]
        whole = all(type(number) is int and 0 <= number <= size for number in (*shape, begin, end))
        if not whole or end - begin != math.prod(shape) * _DTYPES[part["dtype"]].itemsize:
            return False
        ends.append(end)
    sizes = [_size(name) for name in tensors if name.startswith("latents/")]
    for name in map(size_name, sizes):
        latents, rows = tensors[f"latents/{name}"]["shape"], tensors[f"rows/{name}"]["shape"]
        if len(latents) != 4 or len(rows) != 2 or latents[0] != rows[0] or rows[1] != 5:
            return False
    if sizes and len(tensors["text/encoder_hidden_states"]["shape"]) != 3:  # without samples there is no text
        return False
    return max(ends, default=0) == size


def is_intact(path: Path) -> bool:
    """Whether every byte of a shard is as it was written; False if the file is not a shard."""
    about = read_about(path)
    if about is None:
        return False
    header, start = _read_header(path)
    with path.open("rb") as file:
        file.seek(start)
        sums = hashlib.file_digest(file, lambda: _header_sum(header))
    return sums.hexdigest() == about.get("sha256")


@dataclass(frozen=True)
class Shard:
    """A shard's tensors, memory-mapped, so that only the rows in use are read."""

    path: Path

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        header, start = _read_header(self.path)
        storage = torch.UntypedStorage.from_file(
            str(self.path), shared=False, nbytes=self.path.stat().st_size
        )
        tensors = {}
        for name, part in header.items():
            if name == "__metadata__":
                continue
            dtype = _DTYPES[part["dtype"]]
            offset = (start + part["data_offsets"][0]) // dtype.itemsize
            tensors[name] = torch.empty(0, dtype=dtype).set_(storage, offset, part["shape"])  # type: ignore[call-overload]
        return tensors

    @cached_property
    def counts(self) -> dict[Size, int]:
        """Number of samples by the size (H, W) in pixels that their images were cropped to."""
        header, _ = _read_header(self.path)
        names = [name for name in header if name.startswith("latents/")]
        return {_size(name): header[name]["shape"][0] for name in names}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Latent shape (C, h, w) of the samples of that size."""
        return tuple(self._tensors[f"latents/{size_name(size)}"].shape[1:])

    def latents(self, size: Size, index: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, h, w) of the samples `index` (n,) of that size, in the cache's dtype."""
        return self._tensors[f"latents/{size_name(size)}"][index]

    def conditioning(self, size: Size, index: torch.Tensor, *, has_captions: bool = False) -> Conditioning:
        """Conditioning (n rows) of the samples `index` (n,) of that size; SDXL's time ids describe how each was cropped.

        has_captions: with the captions.
        """
        rows = self._tensors[f"rows/{size_name(size)}"][index].long()
        text = self._tensors
        embeddings = text["text/encoder_hidden_states"]
        if len(rows) and not 0 <= int(rows[:, 0].min()) <= int(rows[:, 0].max()) < len(embeddings):
            raise DataError(
                f"{self.path} has samples without a text embedding; fix: `stepdistill prepare` again"
            )
        hidden = embeddings[rows[:, 0]]
        captions = tuple(self.captions[row] for row in rows[:, 0].tolist()) if has_captions else ()
        added = {
            name.removeprefix("text/"): tensor[rows[:, 0]]
            for name, tensor in text.items()
            if name.startswith("text/") and name != "text/encoder_hidden_states"
        }
        if MASK in added:
            added[MASK] = added[MASK].bool()
        if "text_embeds" in added:  # SDXL's
            target = torch.tensor(size).expand(len(rows), 2)
            # float32, because float16 ends at 65504 and bfloat16 cannot hold 1001
            added["time_ids"] = torch.cat([rows[:, 1:], target], dim=1).float()
        return Conditioning(hidden, added, captions)

    @cached_property
    def captions(self) -> list[str]:
        """The distinct captions, in the order of the text embeddings' rows."""
        return json.loads(bytes(self._tensors["captions"].numpy()))


def caption_bytes(captions: list[str]) -> torch.Tensor:
    """The captions as a uint8 tensor of JSON text."""
    return torch.frombuffer(bytearray(json.dumps(captions, allow_nan=False).encode()), dtype=torch.uint8)


def size_name(size: Size) -> str:
    """A size as "HEIGHTxWIDTH", such as "512x768"."""
    return f"{size[0]}x{size[1]}"


def _size(name: str) -> Size:
    height, _, width = name.rpartition("/")[2].partition("x")
    return int(height), int(width)


def _text(header: dict) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _header_sum(header: dict) -> "hashlib._Hash":
    """sha256 object fed with the header without its own "sha256"; the caller adds the tensors' bytes."""
    about = {key: value for key, value in header["__metadata__"].items() if key != "sha256"}
    return hashlib.sha256(_text({**header, "__metadata__": about}))


def _split(content: bytes) -> tuple[dict, memoryview]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _read_header(path: Path) -> tuple[dict, int]:
    """The header and the offset of the tensors in bytes; ValueError if the file is not a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < 2**26:
            raise ValueError(f"{path} is not a safetensors file")
        return json.loads(file.read(length)), 8 + length


class Places:
    """Finds the shard of a sample of one size, and its index there, from its number among all samples of that size.

    counts: number of samples of that size in each shard.
    """

    def __init__(self, counts: list[int]) -> None:
        self._ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shard (n,) of each of the `numbers` (n,), and index within the shard (n,)."""
        shard = torch.bucketize(numbers, self._ends, right=True)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self._ends[:-1]])
        return shard, numbers - before[shard]
