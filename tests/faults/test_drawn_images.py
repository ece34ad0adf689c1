"""Drawn images: numbers that are not finite, which are black as bytes, stop the evaluation; changed bits are noticed; an
interrupted row continues with another batch size."""

import pytest
import torch
from PIL import Image

from stepdistill.cli import guarded
from stepdistill.errors import NonFiniteError
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import rows_of
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.run.image_chunks import read_chunk
from stepdistill.runtime import Processes


@pytest.fixture(scope="module")
def sampler(whole_run):
    return Sampler(whole_run)


ROWS = {
    "teacher-4": "image 3 of the row teacher-4 holds",
    "student-2": "image 3 of the row student-2, drawn by the 2-step rung holds",
}


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.slow_after_first
def test_a_image_that_is_not_finite_names_its_row_and_rung(name, odd, whole_run, sampler, tmp_path, capsys):
    row = next(row for row in rows_of(whole_run) if row.name == name)
    pipeline = sampler._ready(row)

    calls = []

    def spoil(_decoder, _latents, images):
        """Spoils the second image of a batch, which the pipeline decodes one by one."""
        calls.append(len(images))
        images = images.clone()
        if len(calls) == 2:
            images[0, 0, 5, 7] = odd
        return images

    handle = pipeline.vae.decoder.conv_out.register_forward_hook(spoil)
    try:
        prompts = ["a red letter a on white"] * 8
        with pytest.raises(NonFiniteError, match=ROWS[name]):
            sampler.draw(row, prompts[:2], seed=0, first=2)
        assert calls == [1, 1]
        calls.clear()
        folder = tmp_path / "row"
        assert guarded(lambda: sampler.ensure(row, folder, prompts, seed=0, processes=Processes())) == 6
    finally:
        handle.remove()
    assert "fix: evaluation.dtype=float32" in capsys.readouterr().err
    assert list((folder / "images").iterdir()) == list((folder / "chunks").iterdir()) == []


def sampler_of(config, size, *, calls=None):
    """A Sampler of that batch size; with `calls`, memory runs out after so many calls of the pipeline."""

    class Limited(Sampler):
        left = calls

        def draw(self, *args, **options):
            if self.left == 0:
                raise torch.OutOfMemoryError("no memory")
            self.left = None if self.left is None else self.left - 1
            return super().draw(*args, **options)

    options = config.evaluation.model_copy(update={"batch_size": size})
    return Limited(config.model_copy(update={"evaluation": options}))


@pytest.mark.parametrize(
    ("before", "after"),
    [(4, 5), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((5, 4), (2, 8)))],
)
@pytest.mark.slow
def test_a_row_continues_with_another_batch_size_after_memory_ran_out(before, after, whole_run, tmp_path):
    """The batch size changes numbers by rounding alone: latents by less than 1e-4, images by at most 1 grey level."""
    row = next(row for row in rows_of(whole_run) if row.name == "student-2")
    prompts = [f"a red letter {letter} on white" for letter in "abcdefghijk"]
    whole, parts = RowImages(tmp_path / "whole"), RowImages(tmp_path / "parts")
    options = {"seed": 7, "processes": Processes()}
    sampler_of(whole_run, 11).ensure(row, whole.path, prompts, **options)
    with pytest.raises(torch.OutOfMemoryError):
        sampler_of(whole_run, before, calls=1).ensure(row, parts.path, prompts, **options)
    with pytest.raises(torch.OutOfMemoryError):
        sampler_of(whole_run, after, calls=1).ensure(row, parts.path, prompts, **options)
    sampler_of(whole_run, before).ensure(row, parts.path, prompts, **options)
    assert parts.latents().shape == whole.latents().shape
    assert torch.allclose(parts.latents(), whole.latents(), atol=1e-4)
    (drawn,), (expected,) = parts.batches(11), whole.batches(11)
    assert (drawn.int() - expected.int()).abs().max() <= 1


def test_every_flipped_bit_of_a_drawn_image_is_noticed(tmp_path):
    """Some bits of a PNG change other pixels, or none; each is another file than the one that was drawn."""
    folder = RowImages(tmp_path)
    folder.begin("key", {})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (2, 2, 3), generator=generator, dtype=torch.uint8).numpy()
    folder.add(0, [Image.fromarray(pixels)], torch.zeros(1, 4, 1, 1), seconds=1.0)
    file, (marker,) = tmp_path / "images" / "000000.png", folder.markers()
    drawn, chunk = file.read_bytes(), read_chunk(marker)
    for bit in range(8 * len(drawn)):
        changed = bytearray(drawn)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert chunk.changed_file(tmp_path) == file, bit
    file.write_bytes(drawn)
    folder.drop_damaged([marker])
    assert folder.missing(1, 1) == []
    file.write_bytes(changed)
    folder.drop_damaged([marker])
    assert folder.missing(1, 1) == [range(1)]
