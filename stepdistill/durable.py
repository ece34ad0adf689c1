"""Files that are either whole or not there: written beside their place, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON of a file, or None where there is no file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """ValueError in one line where a file cannot be written: no room, no right, a full quota."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {path}: {error}; mend: make room there, then the same command"
        ) from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it to write into, which takes its place at the end and is gone after an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*.safetensors"):
                readable(path)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def canonical_safetensors(path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Rewrites a safetensors file's header with sorted keys: the writer orders its metadata by chance, so that equal
    tensors and metadata would not be equal bytes. metadata: what is added to the file's."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **(metadata or {})}.items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    readable(path)


def readable(path: Path) -> None:
    """Gives a file the rights that new files have here: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a JSON value in its canonical form, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
