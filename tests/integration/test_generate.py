import numpy as np
import torch

from stepdistill.evaluation.generate import Generator, Row, draw, read_images, rows_of
from stepdistill.export import load_few_step
from stepdistill.models.folder import embedded_folder
from stepdistill.models.loading import load_pipeline
from stepdistill.rungs import rung_folder


def test_image_k_does_not_depend_on_the_batch_size(finished_run):
    pipeline = load_pipeline(embedded_folder("teacher"))
    load_few_step(pipeline, rung_folder(finished_run.run_dir, 4))
    prompts = ["a red letter a on white", "a blue letter b on gray", "a black letter z on pink"] * 3
    found = []
    for size in (1, 4, 9):
        images, latents = [], []
        for first in range(0, 9, size):
            chunk = prompts[first : first + size]
            pictures, final = draw(pipeline, chunk, steps=4, guidance_scale=1.0, seed=5, first=first)
            images += [np.asarray(p).astype(int) for p in pictures]
            latents.append(final)
        found.append((np.stack(images), torch.cat(latents)))
    for images, latents in found[1:]:
        assert torch.allclose(latents, found[0][1], atol=1e-4)
        assert np.abs(images - found[0][0]).max() <= 1
    assert np.abs(found[0][0][0] - found[0][0][3]).max() > 50  # equal prompts, other noise: other pictures


def test_rows_are_drawn_once_and_again_when_something_changed(finished_run):
    generator = Generator(finished_run, ["a red letter a on white"] * 3)
    row = Row("again", 1, 1.0)
    first = generator.ensure(row)
    folder = generator.row_folder(row)
    stamp = (folder / "images" / "000000.png").stat().st_mtime_ns
    assert generator.ensure(row) == first
    assert (folder / "images" / "000000.png").stat().st_mtime_ns == stamp
    other = Generator(finished_run, ["a red letter b on white"] * 3)
    assert other.ensure(row)["key"] != first["key"]
    assert read_images(folder, 3).shape == (3, 3, 32, 32)


def test_nfe_counts_guidance_twice(finished_run):
    rows = {row.name: row.nfe for row in rows_of(finished_run)}
    assert rows["teacher-32"] == 64
    assert rows["student-4"] == 4
