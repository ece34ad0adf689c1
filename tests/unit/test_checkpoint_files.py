"""Every flipped bit and every truncation of a checkpoint is found: the one before it is used, with a warning."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch

from stepdistill.disk.durable import read_sealed, write_sealed
from stepdistill.errors import CheckpointError
from stepdistill.run.checkpoint_files import MANIFEST, STATE, checkpoint_name
from stepdistill.training.checkpoint import Checkpoints, Identity, newest, remove_after

STATE_OF = {
    "step": 3,
    "student": {"a.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]])},
    "discriminator": None,
    "optimizers": {"student": {"schedule": {"base_lrs": [0.001]}, "moments": [torch.arange(3)]}},
}


def identity(phase, step):
    return Identity(
        settings={"lora.rank": 4, "ladder.0.phases.0.learning_rate": 0.001},
        rungs={"8": "1f"},
        base="b" * 16,
        cache="c" * 16,
        samples=8,
        versions={"torch": "2.13.0"},
    )


def checkpoints(folder, keep=2):
    return Checkpoints(folder, identity, every_minutes=0, keep=keep, seconds=0.0)


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints after 3 and after 4 updates of phase 1."""
    writer = checkpoints(tmp_path / "checkpoints")
    for step in (3, 4):
        writer.save(1, step, STATE_OF | {"step": step}, None)
    writer.wait()
    return tmp_path / "checkpoints"


def damaged_forms(content, bits):
    """The content with each of these bits flipped in each byte, cut off at each length, and with a byte more."""
    for place in range(len(content)):
        for bit in bits:
            yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
        yield content[:place]
    yield content + b"\0"


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_a_checkpoint_holds_the_state_it_was_given(two):
    read = newest(two, identity)
    assert (read.phase, read.step, read.carried) == (1, 4, None)
    assert same(read.state, STATE_OF | {"step": 4})


@pytest.mark.parametrize("bits", [(3,), pytest.param(tuple(range(8)), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_every_flipped_bit_and_every_truncation_is_found(two, name, bits, caplog):
    path = two / checkpoint_name(1, 4) / name
    content = path.read_bytes()
    whole = newest(two, identity)
    forms = list(damaged_forms(content, bits))
    assert len(forms) == (len(bits) + 1) * len(content) + 1
    for form in forms:
        path.write_bytes(form)
        read = newest(two, identity)
        if read.step == 4:  # JSON that means the same
            assert name == MANIFEST
            assert same(vars(read), vars(whole))
        else:
            assert read.step == 3
    assert str(path.parent) in caplog.text  # one warning for all of them


def test_if_all_are_damaged_each_is_named_before_the_rung_starts_again(two, caplog):
    for folder in two.iterdir():
        (folder / STATE).write_bytes(b"")
    assert newest(two, identity) is None
    assert caplog.text.count("is missing or not as it was written") == 2


def test_each_part_of_the_identity_refuses_by_its_name(two):
    others = {
        "settings": ({"lora.rank": 8, "ladder.0.phases.0.learning_rate": 0.001}, "lora.rank: 4 -> 8"),
        "base": ("x", "another base model"),
        "cache": ("x", "other latents"),
        "samples": (16, r"updates of 8 samples \(now 16\)"),
    }
    for field, (value, says) in others.items():
        with pytest.raises(CheckpointError, match=says):
            newest(two, lambda phase, step, of={field: value}: Identity(**(vars(identity(phase, step)) | of)))


def test_a_checkpoint_that_began_with_another_lora_is_passed_over(two, caplog):
    assert newest(two, lambda phase, step: dataclasses.replace(identity(phase, step), rungs={})) is None
    assert caplog.text.count("began with another LoRA of an earlier rung than that has now") == 2
    assert len(list(two.iterdir())) == 2


def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_not_taken_for_damaged(two, monkeypatch):
    """As on a network file system: a later start may read it."""
    read_bytes = Path.read_bytes

    def stale(path):
        if path.name == STATE and path.parent.name == checkpoint_name(1, 4):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(
            CheckpointError, match=r"cannot read .*step000004: Stale file handle; nothing was removed"
        ):
            newest(two, identity)
    assert newest(two, identity).step == 4


def test_a_checkpoint_of_another_format_is_refused(two):
    path = two / checkpoint_name(1, 4) / MANIFEST
    write_sealed(path, read_sealed(path) | {"format": 1})
    with pytest.raises(CheckpointError, match=r"another version of stepdistill \(format 1; allowed: 3\)"):
        newest(two, identity)


def test_the_checkpoints_after_a_place_are_removed_and_no_others(two):
    writer = checkpoints(two, keep=9)
    for phase, step in ((0, 9), (2, 0)):
        writer.save(phase, step, STATE_OF | {"step": step}, None)
    writer.wait()
    remove_after(two, 1, 3)
    assert sorted(path.name for path in two.iterdir()) == [checkpoint_name(0, 9), checkpoint_name(1, 3)]


def test_another_version_is_warned_of(two, caplog):
    newest(two, lambda phase, step: dataclasses.replace(identity(phase, step), versions={"torch": "2.14.0"}))
    assert "was written with other versions (torch: '2.13.0' -> '2.14.0')" in caplog.text


def test_a_state_that_is_not_finite_is_not_written(tmp_path, caplog):
    writer = checkpoints(tmp_path)
    writer.save(0, 1, {"student": {"a": torch.tensor([1.0, float("nan")])}}, None)
    assert writer.wait() == "state/student/a is not finite"
    assert list(tmp_path.iterdir()) == []
    assert "no checkpoint at phase 0, step 1: state/student/a is not finite" in caplog.text
