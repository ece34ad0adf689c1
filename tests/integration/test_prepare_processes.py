"""The cache filled by separate processes: killed and started again, by two processes, and within bounded memory."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from stepdistill.config.saved import resolved
from stepdistill.data.cache import load_cache
from tests.integration.conftest import tiny_config
from tests.integration.test_prepare import config_of, manifest, shard_bytes, stamps, write_bad, write_good

WORK = """
import sys
from pathlib import Path
from stepdistill.config.load import load_config
from stepdistill.data import prepare
prepare.SHARD = int(sys.argv[2])
prepare.prepare(load_config(sys.argv[1], []))
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print("KiB", peak.split()[1])
"""


def in_a_process(config, folder, *, shard, processes=1):
    """The command that prepares the run with `shard` samples per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    (folder / "work.py").write_text(WORK)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, str(folder / "work.py"), str(folder / "config.yaml"), str(shard)]


def output_of(command):
    """The command's output. It runs with one thread, as torchrun's processes do, because sums depend on the threads."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.slow
def test_bad_files_cost_no_memory(tmp_path):
    folder = write_good(tmp_path / "pictures")
    write_bad(folder)
    config = config_of(folder, tmp_path, "data.max_bad_fraction=0.9")
    alone = config_of(write_good(tmp_path / "alone"), tmp_path, "name=alone")
    outputs = [output_of(in_a_process(c, tmp_path / c.name / "work", shard=1024)) for c in (config, alone)]
    with_bad, without = (int(text.split("KiB")[1]) for text in outputs)
    assert with_bad - without < 64 * 2**10


@pytest.mark.slow
def test_a_killed_prepare_resumes_at_the_first_missing_shard(tmp_path):
    config = tiny_config(tmp_path / "runs", "data.num_images=192")
    uninterrupted = tiny_config(tmp_path / "whole", "data.num_images=192")
    command = in_a_process(config, tmp_path / "work", shard=16)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shard = config.run_dir / "cache/shards/00001.safetensors"
    deadline = time.monotonic() + 120
    while not shard.is_file():
        assert time.monotonic() < deadline
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    first.kill()
    first.wait()
    before = stamps(config)
    assert 2 <= len(before) < 12
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        load_cache(config)
    (shard.parent / ".00005.safetensors.1.partial").write_bytes(b"half")
    output_of(command)
    output_of(in_a_process(uninterrupted, tmp_path / "work2", shard=16))
    after = stamps(config)
    assert {name: after[name] for name in before} == before
    assert not list(shard.parent.glob(".*"))
    assert len(shard_bytes(config)) == 12
    assert shard_bytes(config) == shard_bytes(uninterrupted)
    assert manifest(config) == manifest(uninterrupted)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    folder = write_good(tmp_path / "pictures", 70)
    # fewer than an update takes: one process counts them for both
    write_good(folder, 3, size=(48, 96), name="tall")
    write_bad(folder)
    options = ["data.max_bad_fraction=0.9", "data.buckets=true", "data.resolution=64"]
    one, two = (config_of(folder, tmp_path, f"name={name}", *options) for name in ("one", "two"))
    output_of(in_a_process(one, tmp_path / "work", shard=16))
    output_of(in_a_process(two, tmp_path / "work2", shard=16, processes=2))
    assert len(shard_bytes(one)) == 6
    assert shard_bytes(one) == shard_bytes(two)
    assert manifest(one) == manifest(two)
    assert manifest(one)["moved"] == 3
