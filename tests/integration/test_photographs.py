"""`prepare` with real photographs: those of scikit-image and scikit-learn, in folders and in parquet files of datasets."""

import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.random_teacher import build
from stepdistill.data.cache import load_cache
from stepdistill.data.prepare import prepare
from stepdistill.teacher.loading import load_encoders
from tests.integration.conftest import tiny_config

CAPTIONS = {
    "astronaut.png": "an astronaut in an orange suit, smiling",
    "chelsea.png": "a tabby cat looking up",
    "coffee.png": "a cup of coffee with a spoon",
    "motorcycle_left.png": "a motorcycle in a garage",
    "rocket.jpg": "a rocket on its launch pad at night",
    "page.png": "a page of printed text",
    "china.jpg": "a temple in Beijing",
    "flower.jpg": "a dahlia in front of dark leaves",
}


@pytest.fixture
def photographs(tmp_path):
    """A folder with metadata.jsonl."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    packages = [Path(find_spec(name).origin).parent for name in ("skimage", "sklearn")]
    folder = tmp_path / "photographs"
    folder.mkdir()
    for place in (packages[0] / "data", packages[1] / "datasets" / "images"):
        for file in place.iterdir():
            if file.name in CAPTIONS:
                shutil.copy(file, folder)
    rows = [{"file_name": name, "text": caption} for name, caption in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_photographs_are_prepared_in_their_own_ratios(photographs, tmp_path):
    build("sdxl", tiny=True).save_pretrained(tmp_path / "teacher")
    config = tiny_config(
        tmp_path,
        f"teacher.path={tmp_path / 'teacher'}",
        f"data.source={photographs}",
        "data.num_images=null",
        "data.resolution=256",
        "data.buckets=true",
        "data.min_per_bucket=1",  # eight photographs in more than three ratios
        "data.min_side=150",
    )
    prepare(config)
    cache = load_cache(config)
    assert len(cache) == len(CAPTIONS)
    assert len(cache.sizes) >= 3
    vae = load_encoders(tmp_path / "teacher").vae
    wholes = {Image.open(photographs / name).size[::-1] for name in CAPTIONS}
    for (height, width), count in cache.sizes.items():
        assert 0.8 < height * width / 256**2 < 1.25
        samples = cache.samples((height, width), list(range(count)))
        assert samples.latents.shape[1:] == (4, height // 8, width // 8)
        time_ids = samples.conditioning.added_cond_kwargs["time_ids"]
        assert {tuple(map(int, row[:2])) for row in time_ids.tolist()} <= wholes
        with torch.no_grad():
            decoded = vae.decode(samples.latents / vae.config.scaling_factor).sample
        assert decoded.shape == (count, 3, height, width)


@pytest.mark.slow
def test_a_parquet_file_gives_the_same_latents_as_the_folder_it_was_made_of(photographs, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": (photographs / name).read_bytes(), "path": name}, "text": caption}
        for name, caption in CAPTIONS.items()
    ]
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    rows.append({"image": {"bytes": blank.getvalue(), "path": "blank.png"}, "text": "too small"})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "photographs.parquet"))
    options = ["data.num_images=null", "data.max_bad_fraction=0.2"]
    latents = []
    for source in (photographs, tmp_path / "photographs.parquet"):
        config = tiny_config(
            tmp_path, f"name={source.suffix[1:] or 'folder'}", f"data.source={source}", *options
        )
        prepare(config)
        cache = load_cache(config)
        ((size, count),) = cache.sizes.items()
        assert count == len(CAPTIONS)
        latents.append(cache.samples(size, list(range(count))).latents)
    assert torch.equal(*latents)
    manifest = json.loads((tmp_path / "parquet" / "cache" / "manifest.json").read_text())
    assert manifest["bad"] == {"image_too_small": 1}
