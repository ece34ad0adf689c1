"""Filling the cache from real-world folders: bad files among good ones, interruptions, images of many shapes."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.cache import load_cache
from stepdistill.data.prepare import prepare
from stepdistill.doctor.findings import examine
from stepdistill.ladder import distill
from stepdistill.run.log import read_log
from tests.integration.conftest import tiny_config

GOOD = 40
ONE_UPDATE = "ladder=[{teacher_steps: 2, student_steps: 1, phases: [{objective: mse, max_train_steps: 1}]}]"


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def image(number, size=(40, 40)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def write_good(folder, count=GOOD, size=(40, 40), name="good"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        image(k, size).save(folder / f"{name}{k:03d}.png")
        (folder / f"{name}{k:03d}.txt").write_text(f"{name} image {k}")
    return folder


def write_bad(folder):
    """Writes bad files of every kind; returns the number of each kind."""
    intact = saved(image(0))
    two = [image(0), image(1)]
    contents = {
        "image_unreadable": [
            intact[:-40],
            b"",
            b"\x89PNG garbage",
            saved(image(0), "GIF"),
            b"\xff\xd8\xff",
        ],
        "image_too_large": [saved(Image.new("1", (12000, 12000))), saved(Image.new("L", (9000, 9000)))],
        "image_too_small": [saved(Image.new("RGB", (1, 1)))],
        "image_animated": [saved(two[0], save_all=True, append_images=two[1:])],
    }
    captions = {
        "caption_empty": [b"", b" \n"],
        "caption_not_utf8": [b"caf\xe9"],
        "caption_too_long": [b"w" * 200_000],
    }
    for kind, group in contents.items():
        for k, content in enumerate(group):
            (folder / f"{kind}{k}.png").write_bytes(content)
            (folder / f"{kind}{k}.txt").write_text("a caption")
    for kind, group in captions.items():
        for k, content in enumerate(group):
            (folder / f"{kind}{k}.png").write_bytes(intact)
            (folder / f"{kind}{k}.txt").write_bytes(content)
    (folder / "mute.png").write_bytes(intact)
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("a caption")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone.txt").write_text("a caption")
    counts = {kind: len(group) for kind, group in (contents | captions).items()}
    return counts | {"caption_missing": 1, "unsafe_member": 1, "image_missing": 1}


def config_of(folder, tmp_path, *overrides):
    return tiny_config(tmp_path / "runs", f"data.source={folder}", "data.num_images=null", *overrides)


def manifest(config):
    return json.loads((config.run_dir / "cache" / "manifest.json").read_text())


def shard_bytes(config):
    return {p.name: p.read_bytes() for p in sorted((config.run_dir / "cache/shards").glob("*.safetensors"))}


def stamps(config):
    return {p.name: p.stat().st_mtime_ns for p in (config.run_dir / "cache/shards").glob("*.safetensors")}


def test_bad_files_are_counted_by_kind_and_the_good_ones_are_in_the_cache(tmp_path):
    folder = write_good(tmp_path / "pictures")
    counts = write_bad(folder)
    config = config_of(folder, tmp_path, "data.max_bad_fraction=0.9")
    alone = config_of(write_good(tmp_path / "alone"), tmp_path, "name=alone")
    for each in (config, alone):
        prepare(each)
    content = manifest(config)
    assert content["bad"] == counts
    assert (content["samples"], len(load_cache(config))) == (GOOD, GOOD)
    assert all("object at" not in text for group in content["bad_examples"].values() for text in group)
    assert "gone.png" in content["bad_examples"]["image_missing"][0]
    indices = list(range(GOOD))
    ours, theirs = (load_cache(c).samples((32, 32), indices) for c in (config, alone))
    assert torch.equal(ours.latents, theirs.latents)


def test_too_many_bad_files_stop_prepare_and_prepared_shards_stay(tmp_path):
    folder = write_good(tmp_path / "pictures", 12)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a caption")
    config = config_of(folder, tmp_path)
    with pytest.raises(ValueError, match=r"1 of 13 samples are bad, allowed: 0\.01: 1 image_unreadable"):
        prepare(config)
    assert not (config.run_dir / "cache" / "manifest.json").exists()
    before = stamps(config)
    assert len(before) == 1
    more = config_of(folder, tmp_path, "data.max_bad_fraction=0.2")
    assert prepare(more) is True
    assert stamps(more) == before
    assert len(load_cache(more)) == 12
    strict = config_of(folder, tmp_path, "data.max_bad_fraction=0.2", "data.on_bad.image_unreadable=error")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broken\.png.*data\.on_bad\.image_unreadable=skip"):
            prepare(strict)
        (strict.run_dir / "cache/shards/00000.safetensors").unlink(missing_ok=True)


def test_a_source_without_one_good_image_is_an_error(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.png").write_bytes(b"no image")
        (folder / f"{k}.txt").write_text("a caption")
    with pytest.raises(ValueError, match="none of whose 3 samples is usable: 3 image_unreadable"):
        prepare(config_of(folder, tmp_path, "data.max_bad_fraction=1"))


def bucketed(tmp_path, *overrides):
    folder = write_good(tmp_path / "pictures", 24, size=(64, 64), name="square")
    write_good(folder, 12, size=(96, 48), name="wide")
    write_good(folder, 12, size=(48, 96), name="tall")
    return config_of(folder, tmp_path, "data.buckets=true", "data.resolution=64", *overrides)


def test_buckets_keep_each_images_ratio_and_an_update_sees_one(tmp_path):
    config = bucketed(tmp_path)
    prepare(config)
    cache = load_cache(config)
    (wide,) = (size for size in cache.sizes if size[1] > size[0])
    tall = wide[::-1]
    assert cache.sizes == {(64, 64): 24, wide: 12, tall: 12}
    assert 1.5 < wide[1] / wide[0] < 2.6
    assert abs(wide[0] * wide[1] - 64 * 64) < 0.3 * 64 * 64
    assert {size: shape[1:] for size, shape in cache.latent_shapes.items()} == {
        size: (size[0] * 8 // 32, size[1] * 8 // 32) for size in cache.sizes
    }
    counts = dict.fromkeys(cache.latent_shapes.values(), 0)
    latents = set()
    for update in range(12):
        indices = list(range(4 * update, 4 * update + 4))
        batch = cache.draw(indices, seed=1, group=4)
        counts[tuple(batch.latents.shape[1:])] += 4
        latents |= {latent.numpy().tobytes() for latent in batch.latents}
        halves = [cache.draw(indices[k : k + 2], seed=1, group=4) for k in (0, 2)]
        assert torch.equal(torch.cat([half.latents for half in halves]), batch.latents)
        hidden = torch.cat([half.conditioning.encoder_hidden_states for half in halves])
        assert torch.equal(hidden, batch.conditioning.encoder_hidden_states)
    assert counts == {cache.latent_shapes[size]: count for size, count in cache.sizes.items()}
    assert len(latents) == 48


@pytest.mark.slow
def test_images_of_a_rare_ratio_are_cut_to_the_nearest_that_enough_have(tmp_path, caplog):
    """24 square, 12 wide and 2 tall images, 4 per update: the tall ones are cropped square; manifest and doctor say so."""
    folder = write_good(tmp_path / "pictures", 24, size=(64, 64), name="square")
    write_good(folder, 12, size=(96, 48), name="wide")
    write_good(folder, 2, size=(48, 96), name="tall")
    options = ["data.buckets=true", "data.resolution=64", "data.held_out=0"]
    config = config_of(folder, tmp_path, *options)
    prepare(config)
    (wide,) = (size for size in load_cache(config).sizes if size[1] > size[0])
    assert load_cache(config).sizes == {(64, 64): 26, wide: 12}
    content = json.loads((config.run_dir / "cache" / "manifest.json").read_text())
    assert content["sizes"] == {"64x64": 26, f"{wide[0]}x{wide[1]}": 12}
    assert (content["moved"], content["min_per_bucket"]) == (2, 4)
    counts = f"2 sizes (width x height): 64 x 64: 26, {wide[1]} x {wide[0]}: 12"
    notes = {finding.about: finding for finding in examine(config)}
    assert f"data: all 38 images are cut to {counts}" in notes
    note = notes["data: 2 images are cut to another ratio, as fewer than 4 have their own"]
    assert (note.state, "data.min_per_bucket=1" in note.remedy) == ("note", True)

    before = stamps(config)
    tallies = config.run_dir / "cache" / "tallies.json"
    stamp = tallies.stat().st_mtime_ns
    assert (prepare(config), stamps(config), tallies.stat().st_mtime_ns) == (False, before, stamp)
    tallies.write_text(tallies.read_text().replace("24", "25"))
    assert (prepare(config), stamps(config)) == (False, before)
    assert "25" not in json.loads(tallies.read_text())["pictures"]

    smaller = config_of(
        folder, tmp_path, *options, "training.train_batch_size=2"
    )  # as after a change to two processes
    assert (prepare(smaller), stamps(config)) == (False, before)
    all_ratios = config_of(folder, tmp_path, *options, "name=kept", "data.min_per_bucket=1", ONE_UPDATE)
    prepare(all_ratios)
    assert load_cache(all_ratios).sizes == {(64, 64): 24, wide: 12, wide[::-1]: 2}
    distill(all_ratios)
    assert "2 of 38 images have sizes with fewer images than the 4 samples of an update" in caplog.text


@pytest.mark.slow
def test_training_on_buckets_does_not_depend_on_the_micro_batch(tmp_path):
    losses = []
    for batch, accumulation in ((4, 1), (2, 2)):
        config = bucketed(
            tmp_path,
            f"name=batch{batch}",
            f"training.train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulation}",
            ONE_UPDATE.replace("max_train_steps: 1", "max_train_steps: 2"),
        )
        prepare(config)
        assert distill(config) == [1]
        losses.append([record["student_loss"] for record in read_log(config.run_dir / "log.jsonl")])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_only_shards_of_changed_images_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.data.prepare.SHARD", 16)
    folder = write_good(tmp_path / "pictures", 40)
    config = config_of(folder, tmp_path)
    assert prepare(config) is True
    before = stamps(config)
    assert (prepare(config), stamps(config)) == (False, before)
    (folder / "good020.txt").write_text("another caption")
    assert prepare(config) is True
    after = stamps(config)
    assert [name for name in sorted(before) if after[name] != before[name]] == ["00001.safetensors"]
    imaged = (folder / "good003.png").read_bytes()
    other = bytearray(imaged)
    other[len(other) // 2] ^= 1
    (folder / "good003.png").write_bytes(other)  # of equal length, but broken
    with pytest.raises(ValueError, match=r"1 of 16 samples are bad.*good003\.png"):
        prepare(config)
    (folder / "good003.png").write_bytes(imaged)
    assert prepare(config) is True
    after = stamps(config)
    write_good(folder, 1, name="zlast")
    assert prepare(config) is True
    last = stamps(config)
    assert [name for name in sorted(after) if last[name] != after[name]] == ["00002.safetensors"]
    for k in range(30, 40):
        (folder / f"good{k:03d}.png").unlink()
    (folder / "zlast000.png").unlink()
    assert prepare(config) is True
    assert sorted(stamps(config)) == ["00000.safetensors", "00001.safetensors"]
    assert len(load_cache(config)) == 30


@pytest.mark.parametrize("place", [12, 400, -1])
def test_a_flipped_byte_is_refused_and_mended(tmp_path, place):
    config = tiny_config(tmp_path)
    prepare(config)
    intact = shard_bytes(config)
    path = config.run_dir / "cache/shards/00000.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000\.safetensors is missing or changed"):
        load_cache(config)
    assert prepare(config) is True
    assert shard_bytes(config) == intact
    assert len(load_cache(config)) == 40


def test_a_shard_of_another_source_is_refused_until_all_are_made(tmp_path):
    config, other = tiny_config(tmp_path), tiny_config(tmp_path, "name=other", "seed=1")
    for each in (config, other):
        prepare(each)
    name = Path("cache/shards/00000.safetensors")
    (config.run_dir / name).write_bytes((other.run_dir / name).read_bytes())
    with pytest.raises(ValueError, match=r"00000\.safetensors is missing or changed"):
        load_cache(config)
    assert prepare(config) is True


def test_the_default_held_out_share_is_stored_as_a_number_and_fits_the_cache_of_that_number(tmp_path):
    folder = write_good(tmp_path / "pictures", 12)
    assert prepare(config_of(folder, tmp_path))
    assert manifest(config_of(folder, tmp_path))["data"]["held_out"] == 0.0
    assert not prepare(config_of(folder, tmp_path, "data.held_out=0"))


def test_texts_are_encoded_in_half_precision_if_asked(tmp_path):
    """A cache of the default names no such setting, as in earlier versions, whose caches stay usable."""
    caches = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(tmp_path, f"name={dtype}", f"data.text_dtype={dtype}", "data.num_images=8")
        prepare(config)
        caches[dtype] = load_cache(config)
        assert ("text_dtype" in manifest(config)["data"]) == (dtype == "bfloat16")
    whole, half = (cache.samples(size, list(range(8))) for cache in caches.values() for size in cache.sizes)
    error = (whole.conditioning.encoder_hidden_states - half.conditioning.encoder_hidden_states).abs().max()
    assert 0 < error < 0.1
    assert torch.equal(whole.latents, half.latents)
