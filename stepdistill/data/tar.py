"""Reads a tar archive member by member in constant memory; only regular files, by their offset in the archive.

The standard library's reader keeps all members in memory, trusts the lengths in headers, and accepts members that are not
files. Here a header is 512 bytes; long names come from GNU and pax records of at most 64 KiB; links, devices, pipes and
sparse files are reported as unsafe and never opened.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from stepdistill.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_DATA = 2**16
_LONG_NAME, _PAX, _GLOBAL_PAX = b"L", b"x", b"g"
_SKIPPED = (_GLOBAL_PAX, b"K", b"5")  # pax record for all members, name of a long link, folder
_SPARSE_FURTHER, _SPARSE_FURTHEST = 482, 504
"""Offsets of the byte that says that another header block follows: in a sparse file's header, in each block after it."""


class BrokenArchive(DataError):
    """A tar archive that cannot be read any further."""


@dataclass(frozen=True)
class Member:
    """A member's name, and the offset and size of its bytes; `unsafe`: why they must not be read, or None."""

    name: str
    offset: int
    size: int
    unsafe: str | None = None


def members(path: Path) -> Iterator[Member]:
    """The members of an uncompressed tar, in order; BrokenArchive, with the path, if it is empty, cut off or not a tar."""
    with path.open("rb") as file:
        total = path.stat().st_size
        overrides: dict[str, str] = {}
        while True:
            block = file.read(_BLOCK)
            if not block.strip(b"\0"):
                if not block and not file.tell():
                    raise BrokenArchive(f"{path} is empty")
                return
            info = _header(path, block, file.tell() - _BLOCK)
            further = info.type == tarfile.GNUTYPE_SPARSE and block[_SPARSE_FURTHER]
            while further:
                block = file.read(_BLOCK)
                further = len(block) == _BLOCK and block[_SPARSE_FURTHEST]
            offset = file.tell()
            if not _has_data(info):
                info.size = 0
            if info.size < 0 or offset + info.size > total:
                raise BrokenArchive(
                    f"{path}: cut off within {info.name!r}: {info.size:,} bytes from {offset:,} on, of {total:,}"
                )
            if info.type in (_LONG_NAME, _PAX):
                overrides |= _header_record(path, file, info)
            elif info.type not in _SKIPPED:
                name = overrides.get("path", info.name)
                yield Member(name, offset, info.size, _unsafe(info, name, overrides))
                overrides = {}
            elif info.type == tarfile.DIRTYPE:
                overrides = {}
            file.seek(offset + -(-info.size // _BLOCK) * _BLOCK)


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a safe member."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _header(path: Path, block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenArchive(f"{path}: no tar header at byte {at:,}: {error}") from None


def _has_data(info: tarfile.TarInfo) -> bool:
    """Whether data follows a header; links, folders and devices have none, whatever length their header gives."""
    records = (_LONG_NAME, b"K", _PAX, _GLOBAL_PAX)
    return info.isreg() or info.type in records or info.type not in tarfile.SUPPORTED_TYPES


def _header_record(path: Path, file: BinaryIO, info: tarfile.TarInfo) -> dict[str, str]:
    """The fields of the next member's header that a long-name or pax record overrides."""
    if info.size > _MAX_HEADER_DATA:
        raise BrokenArchive(f"{path}: a header record of {info.size:,} bytes; allowed: {_MAX_HEADER_DATA:,}")
    data = file.read(info.size)
    if info.type == _LONG_NAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields, place = {}, 0
    while place < len(data):
        digits, space, _ = data[place : place + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[place + len(digits) + 1 : place + length - 1].partition(b"=")
        if not length or not equals:
            raise BrokenArchive(f"{path}: a pax record that cannot be read")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += length
    return fields


def _unsafe(info: tarfile.TarInfo, name: str, overrides: dict[str, str]) -> str | None:
    if any(key.startswith("GNU.sparse") for key in overrides) or info.type == tarfile.GNUTYPE_SPARSE:
        return "a sparse file"
    if "size" in overrides:
        return "a member whose length is not in its header"
    if info.type not in tarfile.REGULAR_TYPES:
        return "not a regular file"
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        return "a path that leaves the archive"
    return None
