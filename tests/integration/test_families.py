"""The whole ladder on each real family, from images and from prompts alone, and the LoRAs in a vanilla pipeline."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from eval.random_teacher import FAMILIES, build
from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.data.cache import load_cache
from stepdistill.data.prepare import prepare
from tests.integration.conftest import tiny_config
from tests.original_layout import original_state

MSE = {"objective": "mse", "max_train_steps": 1}


def ladder():
    """16 -> 8 -> 4 -> 2 -> 1 with every objective once."""
    rungs = [
        {"teacher_steps": t, "student_steps": s, "phases": [MSE]}
        for t, s in itertools.pairwise((16, 8, 4, 2, 1))
    ]
    rungs[1]["phases"] = [MSE | {"objective": kind} for kind in ("paired", "single")]
    rungs[-1] |= {"prediction_type": "sample", "phases": [MSE | {"objective": "convert"}, MSE]}
    return rungs


def images(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for k, (height, width) in enumerate([(64, 64), (60, 90), (96, 64), (200, 100)] * 3):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"an image number {k}")
    return folder


def run_config(place, family, source, *overrides):
    build(family, tiny=True).save_pretrained(place / "teacher", safe_serialization=True)
    return tiny_config(
        place,
        f"teacher.path={place / 'teacher'}",
        f"data.source={source}",
        "data.num_images=10",
        "data.teacher_steps=2",
        "training.train_batch_size=2",
        f"ladder={json.dumps(ladder())}",
        "evaluation.num_images=8",
        "evaluation.teacher_steps=[2]",
        "evaluation.features=reader",  # must be named, because these images are not letters
        "evaluation.resize=torchmetrics",
        "evaluation.diversity_prompts=0",
        "evaluation.lora_scales=[]",
        "evaluation.matrix=false",
        "evaluation.cost_batch_sizes=[]",
        "evaluation.floor=false",
        *overrides,
    )


def latents_of(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"} | options
    return pipeline("a thing", generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "brought"),
    [
        *((family, "pictures") for family in FAMILIES),
        ("sdxl", "prompts"),
        ("sdxl", "one file"),
        ("sd21_v", "one file"),
    ],
)
def test_the_whole_ladder_of_a_family_ends_in_loras_that_a_vanilla_pipeline_loads(tmp_path, family, brought):
    (tmp_path / "prompts.txt").write_text("a thing\nanother thing\n")
    alone = brought == "prompts"
    source = tmp_path / "prompts.txt" if alone else images(tmp_path / "pictures")
    config = run_config(tmp_path, family, source)
    if brought == "one file":
        save_file(
            original_state(DiffusionPipeline.from_pretrained(tmp_path / "teacher")),
            tmp_path / "one.safetensors",
        )
        file = [f"teacher.path={tmp_path / 'one.safetensors'}", f"teacher.config={tmp_path / 'teacher'}"]
        config = run_config(tmp_path, family, source, *file)
    stages.run_all(config)
    results = json.loads((config.run_dir / "evaluation" / "results.json").read_text())
    assert {row["row"] for row in results["rows"]} == {"teacher-2", *(f"student-{n}" for n in (8, 4, 2, 1))}
    assert ("fid_to_real" in results["rows"][0]) is not alone
    vanilla = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    vanilla.scheduler = DDIMScheduler.from_pretrained(config.run_dir / "rungs" / "4", subfolder="scheduler")
    plain = latents_of(vanilla)
    vanilla.load_lora_weights(config.run_dir / "rungs" / "4")
    loaded = latents_of(vanilla)
    assert bool(loaded.isfinite().all())
    assert not torch.equal(loaded, plain)
    kind = "v_prediction" if family == "sd21_v" else "epsilon"
    assert vanilla.scheduler.config.prediction_type == kind


def test_sdxl_gets_the_original_size_and_crop_of_each_image(tmp_path):
    config = run_config(tmp_path, "sdxl", images(tmp_path / "pictures"), "data.buckets=true")
    prepare(config)
    cache = load_cache(config)
    offsets_by_size = {}
    for size, count in cache.sizes.items():
        for row in (
            cache.samples(size, list(range(count))).conditioning.added_cond_kwargs["time_ids"].tolist()
        ):
            offsets_by_size.setdefault(tuple(map(int, row[:2])), set()).add(
                (tuple(map(int, row[2:4])), tuple(map(int, row[4:])))
            )
    assert set(offsets_by_size) == {(64, 64), (60, 90), (96, 64), (200, 100)}
    for (height, width), offsets in offsets_by_size.items():
        ((corner, target),) = offsets
        scale = max(target[0] / height, target[1] / width)
        assert corner == (
            int(round(height * scale) - target[0]) // 2,
            int(round(width * scale) - target[1]) // 2,
        )


def test_another_runs_cache_is_reused_unless_it_was_made_by_another_model(tmp_path):
    first = run_config(tmp_path, "sd15", images(tmp_path / "pictures"), "name=first")
    prepare(first)
    second = run_config(tmp_path, "sd15", first.run_dir / "cache", "name=second", "data.num_images=10")
    assert prepare(second) is True
    assert prepare(second) is False
    ours, theirs = (load_cache(config) for config in (second, first))
    ((size, count),) = theirs.sizes.items()
    numbers = list(range(count))
    assert torch.equal(ours.samples(size, numbers).latents, theirs.samples(size, numbers).latents)
    assert not (second.run_dir / "cache" / "shards").exists()
    build("sd15", tiny=True, seed=1).save_pretrained(tmp_path / "other")
    other = [f"teacher.path={tmp_path / 'other'}", "name=third"]
    with pytest.raises(ConfigError, match="holds latents of another model"):
        prepare(run_config(tmp_path, "sd15", first.run_dir / "cache", *other))


def test_the_teachers_images_do_not_depend_on_the_batch_size(tmp_path):
    (tmp_path / "prompts.txt").write_text("a thing\n\nanother thing\n")
    latents = []
    for name, batch in (("whole", 10), ("small", 3)):
        config = run_config(
            tmp_path, "sdxl", tmp_path / "prompts.txt", f"name={name}", f"training.train_batch_size={batch}"
        )
        prepare(config)
        cache = load_cache(config)
        ((size, count),) = cache.sizes.items()
        assert count == 10
        latents.append(cache.samples(size, list(range(10))).latents)
    assert torch.allclose(*latents, atol=1e-4)
    assert len(latents[0].flatten(1).unique(dim=0)) == 10
