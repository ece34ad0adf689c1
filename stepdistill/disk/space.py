"""How much room a file system has, and how much an image takes. No torch."""

import shutil
from pathlib import Path

_DISK_BLOCK = 4096  # bytes; a file takes a whole number of blocks on the disk
_PNG_SHARE = 0.7  # compressed size over 3 bytes per pixel; measured on photographs at a fast setting


def png_bytes(size: tuple[int, int]) -> int:
    """Bytes of a PNG of this (height, width) in pixels, in whole blocks."""
    packed = round(size[0] * size[1] * 3 * _PNG_SHARE)
    return -(-packed // _DISK_BLOCK) * _DISK_BLOCK


def folder_bytes(folder: Path) -> int:
    """The bytes of all files in a folder, links left out; 0 if there is no folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def free_bytes(folder: Path) -> int:
    """The bytes that this user can still write to the file system that holds the folder, or will hold it."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def check_space(folder: Path, need: int, purpose: str) -> None:
    """ValueError if fewer than `need` bytes are free where the folder is. purpose: what they are for, for the message."""
    free = free_bytes(folder)
    if free < need:
        raise ValueError(
            f"{folder}: {purpose} needs about {need:,} bytes and {free:,} are free there: {need - free:,} bytes are "
            f"missing; fix: make room there, then the same command"
        )
