"""The weighted mean of LoRAs, against dense matrices; what does not belong together is refused, with nothing written."""

import dataclasses
import shutil

import pytest
import torch

from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed, sha256_file
from stepdistill.export.merge import MERGED, Source, merge, merged_lora
from stepdistill.models.lora_file import Lora, read_lora, write_lora
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, rung_folder
from tests.unit.test_rank import random_layer

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["line", "conv"]}


def lora(seed, *, rank=4, scale=1.0, **layers):
    shapes = {"line": random_layer(10, 8, rank, seed=seed, scale=scale)}
    shapes["conv"] = random_layer(6, 5, rank, kernel=(3, 3), seed=seed + 50, scale=scale)
    return Lora(shapes | layers, dict(CONFIG))


def sources(*loras):
    return [Source(f"lora {index}", of, None) for index, of in enumerate(loras)]


def mean_of(loras, shares, name):
    return sum(share * of.layers[name].delta() for of, share in zip(loras, shares, strict=True))


def test_at_the_sum_of_the_ranks_the_merged_update_is_the_weighted_mean():
    loras, shares = [lora(0), lora(1, rank=2, scale=0.3)], [0.75, 0.25]
    merged = merged_lora(sources(*loras), shares, 6)
    assert merged.energy_kept == pytest.approx(1.0)
    for name, layer in merged.lora.layers.items():
        assert (layer.rank, layer.scale) == (6, 1.0)
        assert torch.allclose(layer.delta(), mean_of(loras, shares, name), atol=1e-5)


def test_at_a_lower_rank_it_is_the_best_matrix_of_that_rank():
    loras, shares = [lora(0), lora(1), lora(2)], [0.5, 0.3, 0.2]
    merged = merged_lora(sources(*loras), shares, None)
    assert merged.lora.rank == 4
    kept = whole = 0.0
    for name, layer in merged.lora.layers.items():
        u, s, vh = torch.linalg.svd(mean_of(loras, shares, name).flatten(1).double(), full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        assert torch.allclose(layer.delta().flatten(1).double(), best, atol=1e-5)
        assert merged.energy_by_module[name] == pytest.approx(float((s[:4] ** 2).sum() / (s**2).sum()))
        kept, whole = kept + float((s[:4] ** 2).sum()), whole + float((s**2).sum())
    assert merged.energy_kept == pytest.approx(kept / whole)


def test_the_mean_of_one_lora_is_that_lora():
    merged = merged_lora(sources(lora(0)), [1.0], None)
    assert torch.allclose(merged.lora.layers["conv"].delta(), lora(0).layers["conv"].delta(), atol=1e-5)


def write_rung(folder, seed, **changed):
    """A finished rung of 4 steps."""
    folder.mkdir(parents=True)
    of = lora(seed)
    write_lora(folder, of.state(), of.config)
    record = RungRecord(
        4, 8, "epsilon", 4, "base", sha256_file(folder / WEIGHT_NAME), 1.0, samples_per_update=64
    )
    dataclasses.replace(record, **changed).write(folder)
    return folder


def test_merged_rungs_are_a_rung(tmp_path):
    first, second = (write_rung(tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    merge([first, second], tmp_path / "out", weights=[3, 1])
    record = RungRecord.read(tmp_path / "out")
    assert (record.student_steps, record.teacher_steps, record.lora_rank) == (4, 8, 4)
    assert (record.training_seconds, record.samples_per_update) == (None, None)
    assert record.sha256 == sha256_file(tmp_path / "out" / WEIGHT_NAME)
    about = read_sealed(tmp_path / "out" / MERGED)
    assert [of["weight"] for of in about["sources"]] == [0.75, 0.25]
    assert [of["sha256"] for of in about["sources"]] == [
        sha256_file(p / WEIGHT_NAME) for p in (first, second)
    ]
    expected = merged_lora(sources(lora(0), lora(1)), [0.75, 0.25], None)
    found = read_lora(tmp_path / "out")
    assert torch.allclose(found.layers["line"].delta(), expected.lora.layers["line"].delta(), atol=1e-6)


def test_of_runs_the_rungs_that_all_of_them_have_are_merged(tmp_path):
    for seed, name in enumerate(["one", "two"]):
        write_rung(rung_folder(tmp_path / name, 4), seed)
    write_rung(rung_folder(tmp_path / "one", 2), 5, student_steps=2)
    merged = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert list(merged) == [rung_folder(tmp_path / "out", 4)]
    assert RungRecord.read(rung_folder(tmp_path / "out", 4)).student_steps == 4


def test_equal_sources_give_equal_bytes(tmp_path):
    first, second = (write_rung(tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    for name in ("a", "b"):
        merge([first, second], tmp_path / name)
    assert (tmp_path / "a" / WEIGHT_NAME).read_bytes() == (tmp_path / "b" / WEIGHT_NAME).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_steps": 2}, "has student_steps 4, .* 2; allowed: rungs of equal steps on one base"),
        ({"base_fingerprint": "other"}, "has base_fingerprint base, .* other"),
        ({"prediction_type": "sample"}, "has prediction_type epsilon, .* sample"),
        ({"start_timestep": 499}, "has start_timestep None, .* 499"),
        ({"sha256": "0" * 64}, "is not as it was written"),
    ],
)
def test_rungs_that_do_not_belong_together_are_refused(tmp_path, changed, message):
    first, second = write_rung(tmp_path / "one", 0), write_rung(tmp_path / "two", 1, **changed)
    for paths in ([first, second], [first / WEIGHT_NAME, second / WEIGHT_NAME]):
        with pytest.raises(ConfigError, match=message):
            merge(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_files_of_rungs_merge_into_a_rung(tmp_path):
    files = [write_rung(tmp_path / name, seed) / WEIGHT_NAME for seed, name in enumerate(["one", "two"])]
    merge(files, tmp_path / "out")
    assert RungRecord.read(tmp_path / "out").base_fingerprint == "base"


def test_loras_on_other_layers_are_refused(tmp_path):
    other = lora(1, extra=random_layer(3, 3, 4))
    with pytest.raises(
        ConfigError, match=r"differ in 1 layers, first extra \(None and \(3, 3\)\); allowed: LoRAs on"
    ):
        merged_lora(sources(lora(0), other), [0.5, 0.5], None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0], "got 0,0; allowed"),
        ([1], "got 1; allowed: 2"),
        ([2, -1], "got 2,-1"),
        ([float("nan"), 1], "got nan,1"),
        ([float("inf"), 1], "got inf,1; allowed: finite numbers"),
    ],
)
def test_weights_that_are_no_shares_are_refused(tmp_path, weights, message):
    first, second = (write_rung(tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    with pytest.raises(ConfigError, match=f"--weights: {message}"):
        merge([first, second], tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_the_mean_cannot_have_is_refused(tmp_path, rank):
    first, second = (write_rung(tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    with pytest.raises(
        ConfigError, match=f"--rank: got {rank}; allowed: 1 to 8, the sum of the sources' ranks"
    ):
        merge([first, second], tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_what_is_no_lora_is_refused(tmp_path):
    rung, run = write_rung(tmp_path / "one", 0), tmp_path / "run"
    write_rung(rung_folder(run, 4), 1)
    (tmp_path / "empty").mkdir()
    shutil.copyfile(rung / WEIGHT_NAME, tmp_path / "plain.safetensors")
    for paths, message in (
        ([rung, tmp_path / "absent"], "absent, which does not exist"),
        ([rung, tmp_path / "empty"], "holds 0 LoRA files"),
        ([rung, run], "got the run .*run and .*one, which is none"),
        ([run, tmp_path / "absent"], "absent, which does not exist"),
        ([rung, tmp_path / "plain.safetensors"], "is no rung; allowed: rungs alone, or none"),
    ):
        with pytest.raises(ConfigError, match=f"merge: .*{message}"):
            merge(paths, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--output: got .*one, which exists; allowed: a new folder"):
        merge([rung, rung], rung)
    assert not (tmp_path / "out").exists()
