"""Captions held out by their own text; a folder of captioned pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.config import ConfigError, Data
from stepdistill.data.source import (
    evaluation_pictures,
    evaluation_triples,
    is_held_out,
    read_folder,
    training_pictures,
)

SHARE = 0.25


def picture(path, *, size=(40, 30), colour=(200, 10, 10), caption="a red wall"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_the_held_out_share_is_about_as_asked_and_nested():
    captions = [f"caption {k}" for k in range(4000)]
    tenth, quarter = ({c for c in captions if is_held_out(c, share)} for share in (0.1, 0.25))
    assert len(tenth) == pytest.approx(400, abs=4 * np.sqrt(360))
    assert len(quarter) == pytest.approx(1000, abs=4 * np.sqrt(750))
    assert tenth < quarter


def test_letters_training_never_shows_what_the_table_is_about():
    data = Data(num_images=1200, held_out=0.1)
    captions, pictures = training_pictures(data, size=(32, 32), seed=0)
    asked = {t.caption for t in evaluation_triples(data)}
    assert asked
    assert not asked & set(captions)
    assert len(asked) + len(set(captions)) == 520
    assert next(pictures).shape == (128, 3, 32, 32)


def test_a_share_that_leaves_a_side_empty_is_refused():
    with pytest.raises(ConfigError, match=r"data\.held_out: got 0\.9999"):
        training_pictures(Data(held_out=0.9999), size=(32, 32), seed=0)
    with pytest.raises(ConfigError, match=r"data\.held_out: got 1e-09"):
        evaluation_triples(Data(held_out=1e-9))


def test_a_folder_gives_its_pictures_at_the_teachers_size_and_both_sides_are_apart(tmp_path):
    for k in range(40):
        picture(tmp_path / f"{k % 3}" / f"{k:02d}.png", colour=(6 * k, 0, 0), caption=f"wall {k}")
    data = Data(source=str(tmp_path), held_out=SHARE)
    captions, batches = training_pictures(data, size=(16, 24), seed=0)
    pictures = torch.cat(list(batches))
    assert pictures.shape == (len(captions), 3, 16, 24)
    for caption, pixels in zip(captions, pictures, strict=True):
        assert int(pixels[0, 8, 8]) == 6 * int(caption.split()[1])
    assert {p.caption for p in evaluation_pictures(data)} == {f"wall {k}" for k in range(40)} - set(captions)


def test_a_picture_is_cut_from_the_middle_and_turned_as_its_exif_says(tmp_path):
    stripes = Image.new("RGB", (30, 10), (0, 0, 255))
    stripes.paste((255, 0, 0), (10, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    stripes.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("stripes")
    pixels = read_folder(str(tmp_path))[0].pixels((10, 10))
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize(("caption", "said"), [(None, "cannot read"), ("  \n", "is empty")])
def test_a_picture_without_a_caption_is_named(tmp_path, caption, said):
    picture(tmp_path / "x.png", caption=caption)
    with pytest.raises(ConfigError, match=rf"no caption for .*x\.png.*{said}"):
        read_folder(str(tmp_path))


def test_a_folder_without_pictures_and_a_broken_picture_are_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no pictures"):
        read_folder(str(tmp_path))
    (tmp_path / "x.png").write_bytes(b"no picture")
    (tmp_path / "x.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"cannot read the picture .*x\.png"):
        read_folder(str(tmp_path))[0].pixels((8, 8))
