"""Reading the cache: samples by number, in the order that the seed determines, in constant memory."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.data.shards import Places, Shard, caption_bytes, is_intact, read_about, write_shard
from stepdistill.models.network.conditioning import Conditioning


def shard(path, numbers, *, size=(16, 16), more=None, dtype=torch.float16):
    """A shard whose latents and caption embeddings are filled with the number of their sample."""
    count, name = len(numbers), f"{size[0]}x{size[1]}"
    latents = torch.tensor(numbers, dtype=dtype).view(-1, 1, 1, 1)
    rows = torch.tensor([[k, 1001, 70_000, 3, 5] for k in range(count)], dtype=torch.int32).view(-1, 5)
    values = torch.tensor(numbers, dtype=dtype).view(-1, 1)
    tensors = {
        f"latents/{name}": latents.expand(-1, 4, size[0] // 8, size[1] // 8).contiguous(),
        f"rows/{name}": rows,
        "text/encoder_hidden_states": values[:, None].expand(-1, 3, 2).contiguous(),
        "text/text_embeds": values.clone(),
        "captions": caption_bytes([f"caption {k}" for k in numbers]),
    }
    write_shard(path, {**tensors, **(more or {})}, {"key": "k"})
    return Shard(path)


def cache(shards):
    none = Conditioning(torch.zeros(1, 3, 2))
    return LatentCache(shards, prompts=["none"], conditioning=none, unconditional=none)


def numbers_of(samples):
    return samples.latents[:, 0, 0, 0].long().tolist()


def test_a_sample_number_is_found_in_its_shard_past_empty_shards():
    places = Places([0, 3, 0, 0, 2, 0])
    shards, index = places.find(torch.arange(5))
    assert len(places) == 5
    assert shards.tolist() == [1, 1, 1, 4, 4]
    assert index.tolist() == [0, 1, 2, 0, 1]
    assert len(Places([])) == len(Places([0, 0])) == 0


def test_samples_come_in_the_order_asked_for(tmp_path):
    shards = [shard(tmp_path / f"{k}", list(range(10 * k, 10 * k + 10))) for k in range(4)]
    samples = cache(shards).samples((16, 16), [35, 2, 17, 2, 39, 0, 10])
    assert numbers_of(samples) == [35, 2, 17, 2, 39, 0, 10]
    assert samples.latents.dtype == torch.float32
    conditioning = samples.conditioning
    assert conditioning.encoder_hidden_states[:, 0, 0].long().tolist() == [35, 2, 17, 2, 39, 0, 10]
    assert conditioning.added_cond_kwargs["text_embeds"][:, 0].long().tolist() == [35, 2, 17, 2, 39, 0, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_time_ids_are_exact_in_a_cache_of_any_precision(tmp_path, dtype):
    samples = cache([shard(tmp_path / "0", [0, 1], dtype=dtype)]).samples((16, 16), [1])
    assert samples.conditioning.added_cond_kwargs["time_ids"].tolist() == [[1001, 70_000, 3, 5, 16, 16]]


def test_samples_of_one_size_are_drawn_in_the_order_of_the_seed(tmp_path):
    latent_cache = cache([shard(tmp_path / f"{k}", list(range(7 * k, 7 * k + 7))) for k in range(3)])
    indices = list(range(63))
    sequence = numbers_of(latent_cache.draw(indices, seed=5, group=4))
    assert sequence == rng.dataset_rows(indices, size=21, seed=5)
    for epoch in range(3):
        assert sorted(sequence[21 * epoch : 21 * epoch + 21]) == list(range(21))


def test_each_update_has_one_size_and_sizes_come_in_proportion(tmp_path):
    tall = {
        "latents/32x8": torch.full((9, 4, 4, 1), 100.0),
        "rows/32x8": torch.zeros(9, 5, dtype=torch.int32),
    }
    tall["latents/32x8"] += torch.arange(9.0).view(-1, 1, 1, 1)
    latent_cache = cache(
        [shard(tmp_path / "0", list(range(20)), more=tall), shard(tmp_path / "1", list(range(20, 41)))]
    )
    assert latent_cache.sizes == {(16, 16): 41, (32, 8): 9}
    assert latent_cache.latent_shapes == {(16, 16): (4, 2, 2), (32, 8): (4, 4, 1)}
    assert (len(latent_cache), latent_cache.smallest_side) == (50, 1)
    counts = Counter(dict.fromkeys([*range(41), *range(100, 109)], 0))
    for run in range(2):
        updates = [
            numbers_of(latent_cache.draw(list(range(4 * k, 4 * k + 4)), seed=3, group=4))
            for k in range(12 * run, 12 * run + 12)
        ]
        counts.update(number for update in updates for number in update)
        assert set(counts.values()) == {run, run + 1}
        assert sum(update[0] >= 100 for update in updates) == 2
        assert all(len({number >= 100 for number in update}) == 1 for update in updates)
        for k, update in enumerate(updates, 12 * run):
            split = [latent_cache.draw([4 * k + i, 4 * k + i + 1], seed=3, group=4) for i in (0, 2)]
            assert numbers_of(split[0]) + numbers_of(split[1]) == update
    with pytest.raises(ValueError, match="ask for one update's"):
        latent_cache.draw([3, 4], seed=3, group=4)


def test_a_flipped_bit_in_a_shard_is_detected(tmp_path):
    path = shard(tmp_path / "0", list(range(5))).path
    assert is_intact(path)
    content, metadata = path.read_bytes(), read_about(path)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_intact(path), content[max(0, place - 20) : place + 20]
    path.write_bytes(content[:-1])
    assert read_about(path) is None
    path.write_bytes(content)
    assert (is_intact(path), read_about(path)) == (True, metadata)
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["captions"]["dtype"] == "U8"


WORK = """
import sys, torch
from pathlib import Path
from stepdistill.data.cache import open_cache

def anonymous():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1])

cache = open_cache(Path(sys.argv[1]))
before = anonymous()
for k in range(200):
    assert cache.draw(list(range(32 * k, 32 * k + 32)), seed=0, group=32).latents.isfinite().all()
print("KiB", len(cache), before, anonymous() - before)
"""


def synthetic(folder, per_shard):
    """A cache of four shards, written as prepare writes it."""
    from safetensors.torch import save_file

    from stepdistill.disk.durable import sha256_file, write_json

    (folder / "shards").mkdir(parents=True)
    latents, entries = torch.zeros(per_shard, 4, 2, 2, dtype=torch.float16), []
    for k in range(4):
        tensors = {
            "latents/16x16": latents,
            "rows/16x16": torch.zeros(per_shard, 5, dtype=torch.int32),
            "text/encoder_hidden_states": torch.zeros(1, 3, 2, dtype=torch.float16),
            "captions": caption_bytes(["one"]),
        }
        name = f"shards/{k:05d}.safetensors"
        entries.append({"file": name, "sha256": write_shard(folder / name, tensors, {"key": "k"})})
    none = torch.zeros(1, 3, 2)
    text = {"cond.encoder_hidden_states": none, "uncond.encoder_hidden_states": none.clone()}
    save_file(text, folder / "text.safetensors")
    content = {"text_sha256": sha256_file(folder / "text.safetensors"), "prompts": ["one"], "shards": entries}
    write_json(folder / "manifest.json", content)
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    used = []
    for count in (10_000, 1_000_000):
        command = [sys.executable, "-c", WORK, str(synthetic(tmp_path / str(count), count // 4))]
        completed = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        (line,) = (line for line in completed.stdout.splitlines() if line.startswith("KiB"))
        samples, before, grown = map(int, line.split()[1:])
        assert samples == count
        used.append((before, grown))
    (few_before, few), (many_before, many) = used
    assert many_before - few_before < 8 * 2**10
    assert many - few < 24 * 2**10
