"""Records of every kind of data source: in order, complete, errors named, and nothing hangs."""

import csv
import io
import itertools
import json
import os
import tarfile
import threading

import pytest
from PIL import Image

from stepdistill.data.decode import BadSample
from stepdistill.data.file_version import version_of_bytes
from stepdistill.data.records import records


def png(colour=(200, 10, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def result_of(read):
    """The result of a reader, or the kind of its BadSample; fails after five seconds."""
    results = []

    def run():
        try:
            results.append(read())
        except BadSample as error:
            results.append(error.kind)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert results, "it hangs"
    return results[0]


def read_all(source):
    """name -> (caption, image), in order."""
    return {r.name: (result_of(r.read_caption), result_of(r.read_image)) for r in records(str(source))}


def test_a_folder_is_read_in_order_of_names_with_the_texts_beside_the_images(tmp_path):
    for name in ("b.png", "a.JPG", "sub/deeper/d.webp", "sub/c.jpeg", "z.bmp"):
        write(tmp_path / name, f"image {name}")
        write((tmp_path / name).with_suffix(".txt"), f"caption {name}")
    write(tmp_path / "notes.md", "no image")
    write(tmp_path / "alone.txt", "no image")
    write(tmp_path / "mute.png", b"x")
    samples = read_all(tmp_path)
    assert list(samples) == ["a.JPG", "b.png", "mute.png", "z.bmp", "sub/c.jpeg", "sub/deeper/d.webp"]
    assert samples.pop("mute.png") == ("caption_missing", b"x")
    for name, (caption, image) in samples.items():
        assert (caption, image) == (f"caption {name}".encode(), f"image {name}".encode())
    versions = {r.name: r.version() for r in records(str(tmp_path))}
    assert versions == {name: version_of_bytes((tmp_path / name).read_bytes()) for name in versions}
    assert len(set(versions.values())) == len(versions)


def test_the_version_of_a_image_is_the_same_in_a_folder_and_in_an_archive(tmp_path):
    """The version is the length and 64 bytes from the middle: for 1 byte, no byte, and another image of equal length."""
    contents = [b"", b"x", bytes(range(256)) * 9, bytes(range(255, -1, -1)) * 9]
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for k, content in enumerate(contents):
            write(tmp_path / "pictures" / f"{k}.png", content)
            archive.add(tmp_path / "pictures" / f"{k}.png", f"{k}.png")
    expected = [version_of_bytes(content) for content in contents]
    assert [r.version() for r in records(str(tmp_path / "pictures"))] == expected
    assert [r.version() for r in records(str(tmp_path / "many.tar"))] == expected
    assert len(set(expected)) == 4
    assert expected[2].endswith(bytes(range(128, 192)).hex())


def test_links_to_files_are_followed_and_links_to_anything_else_refused(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "pictures"
    write(elsewhere / "real.png", b"x")
    write(folder / "b.txt", "a caption")
    (folder / "linked.png").symlink_to(elsewhere / "real.png")
    (folder / "linked.txt").symlink_to(folder / "b.txt")
    (folder / "dangling.png").symlink_to(elsewhere / "none.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    write(folder / "pipe2.png", b"x")
    os.mkfifo(folder / "pipe2.txt")
    for name in ("dangling", "loop", "pipe", "zero"):
        write(folder / f"{name}.txt", "a caption")
    assert read_all(folder) == {
        "dangling.png": (b"a caption", "image_missing"),
        "linked.png": (b"a caption", b"x"),
        "loop.png": (b"a caption", "image_missing"),
        "pipe.png": (b"a caption", "unsafe_member"),
        "pipe2.png": ("unsafe_member", b"x"),
        "zero.png": (b"a caption", "unsafe_member"),
    }


def test_files_whose_names_are_not_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write(tmp_path / name, b"x")
    write((tmp_path / name).with_suffix(".txt"), "coffee")
    assert list(read_all(tmp_path).values()) == [(b"coffee", b"x")]


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    write(tmp_path / "a.txt", b"a" * (2**17 + 1))
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    assert read_all(tmp_path) == {"a.png": ("caption_too_long", "image_too_large")}


def test_metadata_lines_name_images_and_captions(tmp_path):
    write(tmp_path / "sub" / "a.png", b"x")
    rows = [
        json.dumps({"file_name": "sub/a.png", "text": "a wall"}),
        "",
        json.dumps({"file_name": "sub/a.png", "caption": "again", "width": 3}),
        '{"file_name": "sub/a.png", "te',
        json.dumps({"text": "which?"}),
        json.dumps(["a", "list"]),
        json.dumps({"file_name": "../a.png", "text": "out"}),
        json.dumps({"file_name": "/etc/passwd", "text": "out"}),
        json.dumps({"file_name": "none.png", "text": "gone"}),
        json.dumps({"file_name": "sub/a.png", "text": None}),
        json.dumps({"file_name": "sub", "text": "a folder"}),
        json.dumps({"file_name": "a\0.png", "text": "zero"}),
        json.dumps({"file_name": "\ud800.png", "text": "no text"}),
        json.dumps({"file_name": "n" * 5000, "text": "long"}),
        "[" * 100_000,
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    samples = [(result_of(r.read_caption), result_of(r.read_image)) for r in records(str(tmp_path))]
    assert samples == [
        ("a wall", b"x"),
        ("again", b"x"),
        ("image_missing", "image_missing"),
        ("image_missing", "image_missing"),
        ("image_missing", "image_missing"),
        ("unsafe_member", "unsafe_member"),
        ("unsafe_member", "unsafe_member"),
        ("gone", "image_missing"),
        (None, b"x"),
        ("a folder", "unsafe_member"),
        ("unsafe_member", "unsafe_member"),
        ("no text", "image_missing"),
        ("long", "image_missing"),
        ("image_missing", "image_missing"),
    ]


def test_a_metadata_table_is_read_past_wrong_rows(tmp_path):
    write(tmp_path / "a.png", b"x")
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerows([["file_name", "text"], ["a.png", 'two\nlines, "quoted"'], ["../a.png", "out"]])
        table.writerows([["a.png"], ["a.png", "one", "more"], ["a.png", "w" * 200_000], ["a.png", "last"]])
    samples = [(result_of(r.read_caption), result_of(r.read_image)) for r in records(str(tmp_path))]
    assert samples[:4] == [
        ('two\nlines, "quoted"', b"x"),
        ("unsafe_member", "unsafe_member"),
        (None, b"x"),
        ("one", b"x"),
    ]
    assert samples[4][0] in ("image_missing", "caption_too_long")
    assert samples[5:] == [("last", b"x")]


def packed(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_an_archive_with_the_same_stem_are_one_sample(tmp_path):
    members = [
        ("0.png", b"zero"),
        ("0.txt", b"caption 0"),
        ("1.jpg", b"one"),
        ("1.json", json.dumps({"caption": "caption 1", "width": 3}).encode()),
        ("2.depth.png", b"depth"),
        ("2.png", b"two"),
        ("2.txt", b"caption 2"),
        ("sub/2.png", b"another"),
        ("3.txt", b"no image"),
        ("4.png", b"four"),
        ("5.json", b"[" * 100_000),
        ("5.png", b"five"),
        ("6.json", b'{"caption": "caf\xe9"}'),
        ("6.png", b"six"),
        ("7.png", None),
        ("7.txt", b"caption 7"),
        ("../8.png", b"out"),
        ("9.png", b"nine"),
        ("9.txt", b"w" * 200_000),
    ]
    assert read_all(packed(tmp_path / "a.tar", *members)) == {
        "a.tar:0.png": (b"caption 0", b"zero"),
        "a.tar:1.jpg": ("caption 1", b"one"),
        "a.tar:2.png": (b"caption 2", b"two"),
        "a.tar:sub/2.png": (None, b"another"),
        "a.tar:4.png": (None, b"four"),
        "a.tar:5.png": ("caption_missing", b"five"),
        "a.tar:6.png": ("caption_missing", b"six"),
        "a.tar:7.png": ("unsafe_member", "unsafe_member"),
        "a.tar:../8.png": ("unsafe_member", "unsafe_member"),
        "a.tar:9.png": ("caption_too_long", b"nine"),
    }


def test_a_folder_of_archives_is_read_in_order_and_past_a_broken_one(tmp_path):
    for number in (2, 0):
        packed(tmp_path / f"{number}.tar", (f"{number}.png", b"x"), (f"{number}.txt", b"y"))
    intact = packed(tmp_path / "1.tar", ("1.png", png()), ("1.txt", b"y")).read_bytes()
    (tmp_path / "1.tar").write_bytes(intact[:1024] + b"garbage" * 100)
    os.mkfifo(tmp_path / "3.tar")
    samples = read_all(tmp_path)
    assert list(samples) == ["0.tar:0.png", "1.tar", "2.tar:2.png"]
    assert samples["1.tar"] == ("archive_broken", "archive_broken")


def test_prompts_are_lines_and_a_line_too_long_is_one_bad_sample(tmp_path):
    long = b"w" * 500_000
    write(
        tmp_path / "p.txt", b"first\r\n\n  \nsecond\n" + long + b" tail\n" + "größte".encode() + b"\nno end"
    )
    samples = list(records(str(tmp_path / "p.txt")))
    assert [r.name for r in samples] == ["p.txt:1", "p.txt:4", "p.txt:5", "p.txt:6", "p.txt:7"]
    assert all(r.read_image is None for r in samples)
    captions = [r.read_caption() for r in samples]
    assert [c.strip() for c in captions[:2] + captions[3:]] == [
        b"first",
        b"second",
        "größte".encode(),
        b"no end",
    ]
    assert len(captions[2]) > 2**17


@pytest.mark.parametrize("count", [3, 1000])
def test_records_are_generated_one_by_one(tmp_path, count):
    for k in range(count):
        write(tmp_path / f"{k:04d}.png", b"x")
    assert len(list(itertools.islice(records(str(tmp_path)), 3))) == 3
    assert sum(1 for _ in records(str(tmp_path))) == count
