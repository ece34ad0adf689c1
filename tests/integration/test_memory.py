"""Drawing and measuring many images keeps one batch of them in memory, not all."""

import os
import subprocess
import sys

import pytest

SMALL, MANY = 256, 2304
ALL_AT_ONCE = (MANY - SMALL) * 3 * 32 * 32 / 2**20
"""MiB of the further images alone, 6; as floats four times that."""

GIVE_BACK_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
"""The allocator must hold back nothing, or its habits are all that is seen."""

WORK = """
import sys, psutil
from pathlib import Path
from stepdistill.images.drift import image_drift
from stepdistill.evaluation.measure.features import build_extractor, extract_features
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import Row
from stepdistill.config.saved import read_run_config
from stepdistill.runtime import Processes

sampler, extractor = Sampler(read_run_config(Path(sys.argv[1]))), build_extractor("reader")
images = RowImages(Path(sys.argv[2]))
for count in map(int, sys.argv[3:]):
    prompts = ["a red letter a on white"] * count
    sampler.ensure(Row("student-1", 1, 1.0, 1), images.path, prompts, seed=0, processes=Processes())
    extract_features(images.batches(count), extractor, resize="none")
    image_drift(images.batches(count), images.batches(count))
    print("MiB", psutil.Process().memory_info().rss / 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(trained_run, tmp_path):
    command = [sys.executable, "-c", WORK, trained_run.run_dir, tmp_path / "row", str(SMALL), str(MANY)]
    completed = subprocess.run(
        command, env=os.environ | GIVE_BACK_AT_ONCE, capture_output=True, text=True, check=True
    )
    few, many = (float(line.split()[1]) for line in completed.stdout.splitlines() if line.startswith("MiB"))
    assert many - few < ALL_AT_ONCE / 2
