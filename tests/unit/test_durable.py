import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepdistill.durable import canonical_safetensors, read_json, sha256_json, write_json, write_text


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    tensors = {f"t{k}": torch.arange(k + 1.0) for k in range(3)}
    metadata = {f"key{k}": f'value "{k}" \u00e9' for k in range(8)}
    found = set()
    for k in range(12):
        path = tmp_path / f"{k}.safetensors"
        save_file(tensors, path, metadata=metadata)
        canonical_safetensors(path)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr("os.fsync", lambda _fd: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}


def test_unreadable_json_is_none_and_hashes_ignore_order(tmp_path):
    (tmp_path / "x.json").write_text("{")
    assert read_json(tmp_path / "x.json") is None
    assert read_json(tmp_path / "y.json") is None
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
