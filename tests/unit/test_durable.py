"""Files on disk: complete or absent, sealed with a hash, and errors with their remedy."""

import ast
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepdistill.disk.durable import (
    canonical_safetensors,
    read_json,
    read_sealed,
    sha256_json,
    write_json,
    write_sealed,
    write_text,
    writing,
)


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path):
    tensors = {f"t{k}": torch.arange(k + 1.0) for k in range(3)}
    metadata = {f"key{k}": f'value "{k}" \u00e9' for k in range(8)}
    contents = set()
    for k in range(12):
        path = tmp_path / f"{k}.safetensors"
        save_file(tensors, path, metadata=metadata)
        canonical_safetensors(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr("os.fsync", lambda _fd: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(ValueError, match=r"cannot write .*x\.json: .*no space.*fix: make room there"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_sealed_object_reads_back_and_a_changed_one_does_not(tmp_path):
    path, value = (
        tmp_path / "x.json",
        {"a": 0.1, "b": [1, {"c": None}], "d": {10: 1, 9: 2}},
    )
    write_sealed(path, value)
    assert read_sealed(path) == {**value, "d": {"10": 1, "9": 2}}
    text = path.read_text()
    for changed in (
        text.replace("0.1", "0.2"),
        text.replace('"c"', '"e"'),
        text.replace('"checksum"', '"checksul"'),
        text[:-5],
        f"[{text}]",
        "7",
        "",
    ):
        path.write_text(changed)
        assert read_sealed(path) is None, changed
    path.write_text('{"a": 1}')
    assert read_sealed(path) == {"a": 1}, "of a version that wrote no checksum"


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    value = {"a": float("nan"), "b": [1.5, -float("inf"), {"c": (np.float64("inf"), 2)}]}
    for write in (write_json, write_sealed):
        write(tmp_path / "x.json", value)
        read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
        assert {key: read[key] for key in value} == {"a": None, "b": [1.5, None, {"c": [None, 2]}]}
    assert read_sealed(tmp_path / "x.json") is not None


def test_a_sealed_object_of_an_earlier_version_that_holds_nan_is_read(tmp_path):
    value = {"a": float("nan"), "b": 1}
    (tmp_path / "x.json").write_text(json.dumps({**value, "checksum": sha256_json(value)}))
    assert str(read_sealed(tmp_path / "x.json")) == str(value)


def dumping(function):
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return [ast.unparse(call) for call in calls if ast.unparse(call.func) in ("json.dumps", "json.dump")]


def test_every_writer_of_json_refuses_numbers_that_are_not_finite():
    """Except sha256_json, which also hashes what earlier versions wrote."""
    for path in Path("stepdistill").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name != "sha256_json":
                assert all("allow_nan=False" in call for call in dumping(function)), (path, function.name)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
)
def test_content_that_is_not_json_reads_as_none_and_fast(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None


def test_a_pipe_or_a_huge_file_instead_of_json_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    assert read_json(tmp_path / "pipe.json") is None
    assert read_json(tmp_path / "huge.json") is None


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there, then the same command"),
        (errno.EACCES, "allow this user to write there"),
        (errno.EROFS, "make the file system writable"),
        (errno.ENAMETOOLONG, "a shorter name"),
    ],
)
def test_a_failed_write_is_reported_in_one_line_with_its_remedy(tmp_path, number, remedy):
    with (
        pytest.raises(ValueError, match=rf"cannot write {tmp_path}/x: .*fix: {remedy}"),
        writing(tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number), "elsewhere")


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(ValueError, match=rf"fix: move the file {tmp_path}/runs away"):
        write_text(tmp_path / "runs" / "letters" / "config.yaml", "x")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match=rf"fix: move the folder {tmp_path}/x.json away"):
        write_text(tmp_path / "x.json", "x")
    assert (tmp_path / "runs").read_text() == "mine"


def test_unreadable_json_reads_as_none_and_hashes_ignore_key_order(tmp_path):
    (tmp_path / "x.json").write_text("{")
    assert read_json(tmp_path / "x.json") is None
    assert read_json(tmp_path / "y.json") is None
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
