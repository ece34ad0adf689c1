"""The tar reader against the standard library's, and against harmful archives."""

import io
import tarfile
import tracemalloc

import pytest

from stepdistill.data.tar import BrokenArchive, members, read_member

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "images of walls/" * 5
NAMES = [
    "a.png",
    "a.txt",
    "folder/b.png",
    "folder/b.txt",
    f"{LONG}c.png",
    "empty.txt",
    "wände.png",
    "end.bin",
]


def header(name, *, size=0, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padded(data):
    return data + bytes(-len(data) % 512)


def archive(path, *parts):
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_the_same_as_with_the_standard_library(tmp_path, form):
    names = list(NAMES)
    if form != "ustar":
        names += [f"{LONG * 3}d.png", "after.png"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for number, name in enumerate(names):
            content = bytes([number]) * (0 if name == "empty.txt" else 500 * number + 12)
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if form == "pax" else 1
            tar.addfile(info, io.BytesIO(content))
    read = list(members(path))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
        contents = [tar.extractfile(m).read() for m in tar.getmembers()]
    assert [(m.name, m.offset, m.size) for m in read] == expected
    assert [m.name for m in read] == names
    assert [m.unsafe for m in read] == [None] * len(names)
    assert [read_member(path, m) for m in read] == contents


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_folders_long_name_is_not_given_to_the_file_after_it(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        folder = tarfile.TarInfo(LONG * 3)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("a.png"))
    assert [m.name for m in members(path)] == ["a.png"]


def test_a_link_with_a_long_name_and_a_long_target_is_one_unsafe_member(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        link = tarfile.TarInfo(f"{LONG * 3}link.png")
        link.type, link.linkname = tarfile.SYMTYPE, f"{LONG * 3}aim.png"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("a.png"))
    assert [(m.name, bool(m.unsafe)) for m in members(path)] == [(link.name, True), ("a.png", False)]


def test_members_that_are_not_plain_files_inside_the_archive_are_unsafe(tmp_path):
    kinds = {
        "symlink.png": tarfile.SYMTYPE,
        "hardlink.png": tarfile.LNKTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "character.png": tarfile.CHRTYPE,
        "block.png": tarfile.BLKTYPE,
    }
    parts = [header(name, kind=kind, linkname="/etc/passwd", size=7) for name, kind in kinds.items()]
    paths = ["../x.png", "a/../../x.png", "/abs.png", "..\\x.png"]
    parts += [header(name, size=3) + padded(b"abc") for name in paths]
    parts += [header("sparse.png", size=3, kind=tarfile.GNUTYPE_SPARSE) + padded(b"abc")]
    record = b"22 GNU.sparse.major=1\n"
    parts += [header("pax", size=len(record), kind=b"x") + padded(record)]
    parts += [header("sparse2.png", size=3) + padded(b"abc")]
    record = b"18 size=999999999\n"
    parts += [header("pax", size=len(record), kind=b"x") + padded(record)]
    parts += [header("long.png", size=3) + padded(b"abc"), header("good.png", size=3) + padded(b"abc")]
    read = list(members(archive(tmp_path / "a.tar", *parts)))
    assert [m.name for m in read[:-1] if m.unsafe is None] == []
    unsafe = [*kinds, *paths, "sparse.png", "sparse2.png", "long.png"]
    assert [m.name for m in read] == [*unsafe, "good.png"]
    assert [m.unsafe for m in read[: len(kinds)]] == ["not a regular file"] * len(kinds)
    assert {m.unsafe for m in read[5:9]} == {"a path that leaves the archive"}
    assert [m.unsafe for m in read[9:12]] == ["a sparse file"] * 2 + [
        "a member whose length is not in its header"
    ]
    assert read_member(tmp_path / "a.tar", read[-1]) == b"abc"


def test_a_sparse_file_of_many_parts_does_not_lose_what_follows(tmp_path):
    first = bytearray(header("sparse.png", size=3, kind=tarfile.GNUTYPE_SPARSE))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = f"{sum(first):06o}\0 ".encode()
    second, third = bytearray(512), bytes(512)
    second[504] = 1
    parts = [bytes(first), bytes(second), third, padded(b"abc"), header("good.png", size=3), padded(b"abc")]
    read = list(members(archive(tmp_path / "a.tar", *parts)))
    assert [(m.name, m.unsafe) for m in read] == [("sparse.png", "a sparse file"), ("good.png", None)]
    assert read_member(tmp_path / "a.tar", read[1]) == b"abc"


def broken(path):
    with pytest.raises(BrokenArchive, match=str(path)):
        list(members(path))


def test_a_truncated_archive_is_broken_and_gives_its_complete_members(tmp_path):
    path = tmp_path / "a.tar"
    content = header("a.png", size=3) + padded(b"abc") + header("b.png", size=1000) + padded(b"b" * 1000)
    for length in (100, 511, 513, 1024 + 200, 1024 + 512, 1024 + 512 + 999):
        path.write_bytes(content[:length])
        broken(path)
    path.write_bytes(content[: 1024 + 700])
    reader = members(path)
    assert next(reader).name == "a.png"
    with pytest.raises(BrokenArchive, match=r"cut off within 'b\.png'"):
        next(reader)


def test_a_file_that_is_not_an_archive_is_broken(tmp_path):
    path = tmp_path / "a.tar"
    flipped = bytearray(header("a.png"))
    flipped[3] ^= 1
    for content in (b"", b"garbage", b"\x1f\x8b" + bytes(range(256)) * 8, bytes(flipped) + bytes(1024)):
        path.write_bytes(content)
        broken(path)
    negative = header("a.png", size=-512)
    broken(archive(path, negative))


@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"K"])
def test_a_pax_record_of_a_gibibyte_is_refused_unread(tmp_path, kind):
    path = tmp_path / "a.tar"
    for real in (False, True):
        with path.open("wb") as file:
            file.write(header("record", size=2**30, kind=kind))
            file.truncate(2**30 + 2048 if real else 2048)
        tracemalloc.start()
        if not real or kind in b"xL":
            broken(path)
        else:
            assert list(members(path)) == []
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("record", [b"99", b"0 a=b\n", b"5 ab\n", b"xx a=b\n", b"-7 a=b\n", b"9" * 30])
def test_a_pax_record_that_cannot_be_read_is_broken(tmp_path, record):
    parts = [header("pax", size=len(record), kind=b"x"), padded(record), header("a.png")]
    broken(archive(tmp_path / "a.tar", *parts))


@pytest.mark.slow
def test_many_members_are_read_in_constant_memory(tmp_path):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(header("a.png") * 1000)
        file.write(bytes(1024))
    tracemalloc.start()
    assert sum(1 for _ in members(path)) == 50_000
    assert tracemalloc.get_traced_memory()[1] < 2**24  # the standard library keeps 22 MB
    tracemalloc.stop()
