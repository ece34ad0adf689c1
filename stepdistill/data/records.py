"""Where samples come from: a stream of records in a fixed order. Records are lazy: nothing is decoded or held in memory.

letters, pairs     worlds of the demo, rendered from a seed (not read here; see source.py)
FOLDER             NAME.png (.jpg, .jpeg, .webp, .bmp) with NAME.txt beside it, in folders of any depth
FOLDER             with metadata.jsonl or metadata.csv: file_name, and text (or caption, or prompt)
FILE.tar, FOLDER   a tar or a folder of them: NAME.png, NAME.txt (or NAME.json) one after the other, as webdataset packs them
FILE.parquet       or a folder of them, with columns image and text; needs the datasets package (extra "data")
FILE.txt           prompts only, one per line: the teacher draws the images
FOLDER             the cache of another run, whose latents are used unchanged
"""

import csv
import functools
import importlib.util
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from stepdistill.config import ConfigError
from stepdistill.config.data import Kind
from stepdistill.data.decode import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, BadSample
from stepdistill.data.file_version import version_of_bytes, version_of_file, version_of_part
from stepdistill.data.shards import Shard
from stepdistill.data.tar import BrokenArchive, Member, members, read_member

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_KEYS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
_MAX_MEMBERS = 16


@dataclass(frozen=True)
class Record:
    """One sample, not read yet.

    name          identifies the sample in messages
    read_caption  returns the caption as bytes or text, None if there is none; may raise BadSample
    read_image    returns the encoded image, or a decoded one; may raise BadSample; None if the source has no images:
                  prompts only, or another run's cache
    version       returns the image's version, which changes if another image takes the name (file_version.py)
    """

    name: str
    read_caption: Callable[[], bytes | str | None]
    read_image: Callable[[], bytes | Image.Image] | None
    version: Callable[[], str] = str


def records(source: str) -> Iterator[Record]:
    """The records of any source but the demo's worlds; ConfigError if the source has no records or does not exist."""
    path = Path(source).expanduser()
    reader = _reader(path)
    first = next(reader, None)
    if first is None:
        raise ConfigError(f"data.source: got {source!r}, {_why_empty(path)}; allowed: {_ALLOWED}")
    return itertools.chain([first], reader)


def is_prompts_only(source: str) -> bool:
    """Whether the source has prompts only, so that the teacher draws the images."""
    return Path(source).suffix == ".txt"


def is_cache(source: str) -> bool:
    """Whether the source is the cache of another run."""
    return (Path(source).expanduser() / "manifest.json").is_file()


_ALLOWED = (
    '"letters", "pairs", a folder of images with captions (NAME.png and NAME.txt, or metadata.jsonl), '
    ".tar or .parquet files, a .txt file of prompts"
)


def _reader(path: Path) -> Iterator[Record]:
    if path.suffix == ".txt" and path.is_file():
        return _prompts(path)
    if path.suffix == ".tar" and path.is_file():
        return _archives([path])
    if path.suffix == ".parquet" and path.is_file():
        return _parquet([path])
    if not path.is_dir():
        return iter(())
    if is_cache(str(path)):
        return _cached(path)
    for name in METADATA:
        if (path / name).is_file():
            return _listed(path, path / name)
    for suffix, read in ((".tar", _archives), (".parquet", _parquet)):
        files = sorted(f for f in path.iterdir() if f.suffix == suffix and f.is_file())
        if files:
            return read(files)
    return _folder(path)


def _cached(folder: Path) -> Iterator[Record]:
    """The captions of another run's cache, which has latents in place of images."""
    for file in sorted((folder / "shards").glob("*.safetensors")):
        for number, caption in enumerate(Shard(file).captions):
            yield Record(f"{file.name}:{number}", _value(caption), None)


def _why_empty(path: Path) -> str:
    if not path.exists():
        return "which does not exist"
    return "which holds no images with captions" if path.is_dir() else "which holds no samples"


def read_file(path: Path, *, most: int) -> bytes:
    """The bytes of a regular file.

    BadSample if it is missing, larger than `most` bytes, or not a regular file: reading a pipe would block for ever. The
    kind is about the image if `most` is MAX_IMAGE_BYTES, else about the caption.
    """
    missing: Kind = "image_missing" if most == MAX_IMAGE_BYTES else "caption_missing"
    large: Kind = "image_too_large" if most == MAX_IMAGE_BYTES else "caption_too_long"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unsafe_member", f"{path} is not a regular file")
        if status.st_size > most:
            raise BadSample(large, f"{path} has {status.st_size:,} bytes; allowed: {most:,}")
        return path.read_bytes()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no file can have
        raise BadSample(missing, f"cannot be read: {error}") from None


def _folder(folder: Path) -> Iterator[Record]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            file = Path(parent, name)
            if file.suffix.lower() in IMAGE_SUFFIXES:
                yield _of_file(folder, file, _text_beside(file))


def _text_beside(file: Path) -> Callable[[], bytes]:
    return lambda: read_file(file.with_suffix(".txt"), most=MAX_CAPTION_BYTES)


def _of_file(folder: Path, file: Path, caption: Callable[[], bytes | str | None]) -> Record:
    name = file.relative_to(folder).as_posix()
    return Record(
        name, caption, lambda: read_file(file, most=MAX_IMAGE_BYTES), functools.partial(version_of_file, file)
    )


def _listed(folder: Path, table: Path) -> Iterator[Record]:
    """One record per row of metadata.jsonl or metadata.csv."""
    for number, row in enumerate(_rows(table), 1):
        name = row.get("file_name")
        caption = next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), None)
        row_name = f"{table.name}:{number}"
        if not isinstance(name, str):
            yield _bad(row_name, "image_missing", "the row has no file_name")
        elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            yield _bad(row_name, "unsafe_member", f"{name!r} leaves the folder")
        else:
            yield _of_file(folder, folder / name, _value(caption))


def _rows(table: Path) -> Iterator[dict]:
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table.suffix == ".csv":
            reader = csv.DictReader(file)
            while True:
                try:
                    yield next(reader)
                except StopIteration:
                    return
                except csv.Error:  # a field over 128 KiB; the reader continues after it
                    yield {}
        for line in file:
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = {}
            if row is not None:
                yield row if isinstance(row, dict) else {}


def _value(text: str | None) -> Callable[[], str | None]:
    return lambda: text


def _bad(name: str, kind: Kind, message: str) -> Record:
    def refuse() -> bytes:
        raise BadSample(kind, message)

    return Record(name, refuse, refuse)


def _archives(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        try:
            for _, group in itertools.groupby(members(path), key=_stem):
                yield from _grouped(path, group)
        except BrokenArchive as error:
            yield _bad(path.name, "archive_broken", str(error))


def _stem(member: Member) -> str:
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _grouped(path: Path, group: Iterable[Member]) -> Iterator[Record]:
    """The sample made of the members with one stem; each unsafe member becomes a bad sample instead."""
    parts: dict[str, Member] = {}
    for member in group:
        if member.unsafe is not None:
            yield _bad(f"{path.name}:{member.name}", "unsafe_member", f"{member.name!r} is {member.unsafe}")
        elif len(parts) < _MAX_MEMBERS:
            suffix = PurePosixPath(member.name).suffix.lower()
            if PurePosixPath(member.name).name.count(".") == 1:
                parts[suffix] = member
            else:  # a.png takes precedence over a.depth.png
                parts.setdefault(suffix, member)
    image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    if image is not None:
        yield Record(
            f"{path.name}:{image.name}",
            _caption_of(path, parts),
            _bytes_of(path, image),
            functools.partial(version_of_part, path, image.offset, image.size),
        )


def _bytes_of(path: Path, member: Member) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.size > MAX_IMAGE_BYTES:
            raise BadSample("image_too_large", f"{member.size:,} bytes; allowed: {MAX_IMAGE_BYTES:,}")
        return read_member(path, member)

    return read


def _caption_of(path: Path, parts: dict[str, Member]) -> Callable[[], bytes | str | None]:
    def read() -> bytes | str | None:
        member = parts.get(".txt") or parts.get(".json")
        if member is None:
            return None
        if member.size > MAX_CAPTION_BYTES:
            raise BadSample("caption_too_long", f"{member.size:,} bytes; allowed: {MAX_CAPTION_BYTES:,}")
        content = read_member(path, member)
        if member is parts.get(".txt"):
            return content
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadSample("caption_missing", f"{member.name} is not JSON: {error}") from None
        row = row if isinstance(row, dict) else {}
        return next((row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)), None)

    return read


def _parquet(paths: list[Path]) -> Iterator[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f'data.source: {paths[0]} needs the datasets package; fix: pip install "stepdistill[data]"'
        )
    import datasets

    rows = datasets.load_dataset("parquet", data_files=[str(p) for p in paths], split="train", streaming=True)
    image = next((name for name in ("image", "jpg", "png") if name in (rows.features or {})), None)
    caption = next((name for name in CAPTION_KEYS if name in (rows.features or {})), None)
    if image is None or caption is None:
        raise ConfigError(
            f"data.source: {paths[0]} has the columns {', '.join(rows.features or [])}; allowed: image and "
            f"one of {', '.join(CAPTION_KEYS)}"
        )
    for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
        text = row[caption]
        content = (row[image] or {}).get("bytes")
        name = f"{paths[0].name}:{number}"
        if content is None:
            yield _bad(name, "image_missing", "the row holds no image")
        else:
            yield Record(
                name, _value(text), _value_bytes(content), functools.partial(version_of_bytes, content)
            )


def _value_bytes(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _prompts(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_CAPTION_BYTES + 2):
            number += 1
            rest = line
            while len(rest) == MAX_CAPTION_BYTES + 2 and not rest.endswith(b"\n"):
                rest = file.readline(MAX_CAPTION_BYTES + 2)
            if line.strip():
                yield Record(f"{path.name}:{number}", _line(line), None)


def _line(line: bytes) -> Callable[[], bytes]:
    return lambda: line
