"""What data take: training's wait for micro-batches, and preparing a data set against the VAE's encoding alone."""

from pathlib import Path

import numpy as np
from PIL import Image
from random_teacher import build, build_vae

from stepdistill.config import Data, RunConfig
from stepdistill.data.buckets import Sizes
from stepdistill.data.decode import cover
from stepdistill.data.encode import Encoder, encode_pixels
from stepdistill.data.prepare import prepare
from stepdistill.data.records import records
from stepdistill.data.source import image_of
from stepdistill.ladder import distill
from stepdistill.run.log import read_log
from stepdistill.stages import open_run
from stepdistill.teacher.loading import load_encoders

from .clock import median_seconds


def waiting(config: RunConfig, updates: int) -> dict[str, float]:
    """The share of a rung's training time that is spent waiting for micro-batches, from its log."""
    rung = config.ladder[1]
    phases = tuple(phase.model_copy(update={"max_train_steps": updates}) for phase in rung.phases[:1])
    short = rung.model_copy(update={"phases": phases, "teacher_steps": rung.teacher_steps})
    config = config.model_copy(update={"name": "waiting", "ladder": (short,)})
    open_run(config)
    prepare(config)
    distill(config)
    lines = read_log(config.run_dir / "log.jsonl")[1:]
    waited = sum(line["data_seconds"] for line in lines)
    whole = sum(config.training.train_batch_size / line["images_per_second"] for line in lines)
    return {
        "waited_seconds": round(waited, 4),
        "seconds": round(whole, 3),
        "share": round(waited / whole, 5),
        "seconds_an_update": round(whole / len(lines), 4),
    }


def preparing(scratch: Path, *, images: int = 8, side: int = 192) -> dict[str, float]:
    """Seconds to prepare a shard of 1600 x 1200 JPEGs, and their ratio to those of a VAE of Stable Diffusion's size alone on
    the same batches."""
    scratch.mkdir(parents=True, exist_ok=True)
    build("sd15", tiny=True).save_pretrained(scratch / "teacher")
    pipeline = load_encoders(scratch / "teacher")
    pipeline.register_modules(vae=build_vae("sd15").eval().requires_grad_(False))
    (scratch / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for k in range(images):
        small = Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(scratch / "pictures" / f"{k:02d}.jpg")
        (scratch / "pictures" / f"{k:02d}.txt").write_text(f"image {k}")
    data = Data(source=str(scratch / "pictures"))
    encoder = Encoder(pipeline, data, Sizes(data, teacher_size=(side, side), multiple=64))
    image_records = list(records(data.source))
    pixels = np.stack([cover(image_of(record, data), (side, side))[0] for record in image_records])
    bare = median_seconds(lambda: encode_pixels(pipeline, pixels), 3)
    whole = median_seconds(lambda: encoder.encode(image_records, first=0), 3)
    return {"pictures": images, "side": side, "seconds": round(whole, 3), "ratio": round(whole / bare, 3)}
