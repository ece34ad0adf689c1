"""Atomic writes: a file is written under a temporary name beside its place, then renamed, so it is complete or absent.
Also "sealed" JSON objects, whose checksum shows whether they were changed after they were written.
"""

import ctypes
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from stepdistill.disk.guarded_folder import check_present, make_folder

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
CHECKSUM = "checksum"
"""Key of a sealed object: sha256_json of all its other keys."""
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LARGEST_JSON = 2**28
_REPLACED = ".replaced.partial"
# os.umask can be read only by setting it. At import there are no other threads, whose files would get the wrong mode.
_UMASK = os.umask(0)
os.umask(_UMASK)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_BLOCKED = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
_OTHER_REMEDY = "remove the cause, then the same command"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, then the same command"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        "allow this user to write there, then the same command; or name another folder",
    ),
    errno.EROFS: "make the file system writable, then the same command; or name another folder",
    errno.ENAMETOOLONG: "a shorter name",
    **dict.fromkeys((errno.ENOENT, errno.ELOOP, errno.EINVAL), "name a folder where files can be made"),
}


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Writes these parts as a file in one step: a reader sees the old file or the new one. ValueError in one line if it
    cannot be written; the old file then stays, and no temporary file is left beside it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        make_folder(path.parent)
        try:
            with partial.open("wb") as file:
                _write_synced(file, *parts)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """write_bytes of a text, encoded as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """write_text of a value as indented JSON; a number that is not finite becomes null."""
    write_text(path, _json(value))


def write_image(path: Path, image: "Image.Image") -> None:
    """write_bytes of an image, in the format of the file name's suffix (IMAGE_FORMATS)."""
    write_bytes(path, image_bytes(image, IMAGE_FORMATS[path.suffix.lower()]))


def image_bytes(image: "Image.Image", file_format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image as a file in one of PIL's formats; `options` go to that format's writer."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def read_json(path: Path) -> Any | None:
    """The JSON value in a file; None if the file is missing, is not JSON, or is larger than _LARGEST_JSON bytes."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _json(value: Any) -> str:
    """Indented JSON. JSON has no NaN and no infinity: other programs do not read a file with them."""
    return json.dumps(finite_or_null(value), indent=2, allow_nan=False) + "\n"


def finite_or_null(value: Any) -> Any:
    """A value of JSON data with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object as JSON data, with a checksum over all its keys added; it must not have a key "checksum". Numbers that are
    not finite become null."""
    plain = json.loads(json.dumps(finite_or_null(value), allow_nan=False))
    return {**plain, CHECKSUM: sha256_json(plain)}


def unsealed(stored: Any) -> dict[str, Any] | None:
    """The object that was sealed, without its checksum; None if `stored` is not an object or was changed since. An object
    without a checksum, as earlier versions wrote it, is returned as it is."""
    if not isinstance(stored, dict):
        return None
    name = CHECKSUM if CHECKSUM in stored else next(reversed(stored), None)
    rest = {key: value for key, value in stored.items() if key != name}
    fits = stored.get(name) == sha256_json(rest)
    if name == CHECKSUM:
        return rest if fits else None
    # if the last key holds a right checksum, the object was sealed and the name of that key is damaged
    return None if fits else dict(stored)


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """write_json of an object with a checksum added."""
    write_json(path, sealed(value))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object that write_sealed wrote; None if the file is missing or was changed."""
    return unsealed(read_json(path))


@functools.cache
def warn_of_damage(path: Path, then: str) -> None:
    """Warns, once, that a file is missing or was changed, and what follows from it, such as "it is drawn again"."""
    logger.warning("%s is missing or not as it was written: %s", path, then)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside it, a failure to write the file (disk full, no permission, path blocked) becomes a ValueError in one line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and _os_error(error) is None:
            raise
        check_present(path)
        raise ValueError(unwritable(path, error)) from None


def unwritable(path: Path, error: Exception) -> str:
    """Why a file cannot be written, and the remedy, in one line."""
    number = _os_error(error)
    reason = os.strerror(number) if number else " ".join(str(error).split())
    blocked = _unblock(path) if number in _BLOCKED else None
    return f"cannot write {path}: {reason}; fix: {blocked or _REMEDIES.get(number or errno.ENOSPC, _OTHER_REMEDY)}"


def _os_error(error: Exception) -> int | None:
    """The errno of an error; also of a library's error that has it only in its text: "File too large (os error 27)"."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = re.search(r"\((?:os error |.*?\[Errno )(\d+)[)\]]", str(error))
    return int(match[1]) if match else None


def _unblock(path: Path) -> str | None:
    """The remedy if a file is where a folder has to be, or a folder where the file has to be; else None."""
    with suppress(OSError):
        there = next(p for p in (path, *path.parents) if p.exists())
        if there == path or not there.is_dir():
            kind = "folder" if there.is_dir() else "file"
            return f"move the {kind} {there} away, then the same command"
    return None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it replaces `folder` at the end and is removed after an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            make_folder(partial)
            yield partial
            for path in partial.rglob("*"):
                if path.suffix == ".safetensors":
                    readable(path)
                _sync(path)
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_synced(file: BinaryIO, *parts: bytes | memoryview) -> None:
    file.writelines(parts)
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Makes a file's bytes, or the names of a folder's files, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(partial: Path, folder: Path) -> None:
    """Renames a finished folder to its place, and makes the new name durable. At every moment the old folder or the new
    one is there as a whole; where two folders cannot be exchanged in one step, `put_back_replaced` restores that after a
    kill."""
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    put_back_replaced(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(partial)
    if not folder.exists():
        partial.rename(folder)
    elif _exchange(partial, folder):
        partial.rename(replaced)
    else:
        folder.rename(replaced)
        try:
            partial.rename(folder)
        except BaseException:
            replaced.rename(folder)
            raise
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back_replaced(parent: Path) -> None:
    """Puts back the old folders that a process renamed away and did not live to replace."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        folder = parent / replaced.name.removeprefix(".").removesuffix(_REPLACED)
        if not folder.exists():
            with suppress(OSError):
                replaced.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def canonical_safetensors(path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Rewrites a safetensors file in the form of `canonical`."""
    content = canonical(path.read_bytes(), metadata=metadata)
    with path.open("wb") as file:
        _write_synced(file, content)
    readable(path)


def canonical(content: bytes, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file's bytes with the keys of its header sorted. safetensors writes metadata in random order, so equal
    tensors and metadata would otherwise not give equal bytes. metadata: entries to add to the file's metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **(metadata or {})}.items()))
    entries = dict(sorted(header.items()))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def readable(path: Path) -> None:
    """Gives a file the usual permissions of a new file (by umask); only its owner can read one of safetensors'."""
    path.chmod(0o666 & ~_UMASK)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """sha256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """The first 16 hexadecimal digits of the sha256 of a JSON value with sorted keys. It takes NaN too, which earlier
    versions sealed."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
