"""Captions are held out by their own text; which records are trained on and which ones the table uses."""

import numpy as np
import pytest
from PIL import Image

from stepdistill.config import ConfigError, Data
from stepdistill.data.decode import read_caption
from stepdistill.data.source import (
    evaluation_images,
    is_held_out,
    measured_captions,
    training_records,
)
from stepdistill.demo.world import world_of

SHARE = 0.25


def image(path, *, size=(40, 30), colour=(200, 10, 10), caption="a red wall"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    path.with_suffix(".txt").write_text(caption)


def captions_of(data):
    return [read_caption(record.read_caption()) for record in training_records(data, seed=0)]


def test_the_held_out_share_is_as_requested_and_larger_shares_contain_smaller_ones():
    captions = [f"caption {k}" for k in range(4000)]
    tenth, quarter = ({c for c in captions if is_held_out(c, share)} for share in (0.1, 0.25))
    assert len(tenth) == pytest.approx(400, abs=4 * np.sqrt(360))
    assert len(quarter) == pytest.approx(1000, abs=4 * np.sqrt(750))
    assert tenth < quarter


def test_training_on_letters_never_shows_held_out_captions():
    data = Data(num_images=1200, held_out=0.1)
    captions = captions_of(data)
    measured = set(measured_captions(world_of("letters"), data))
    assert len(captions) == 1200
    assert measured
    assert not measured & set(captions)
    assert len(measured) + len(set(captions)) == 520


def test_a_held_out_share_that_selects_no_captions_is_refused():
    with pytest.raises(ConfigError, match=r"data\.held_out: got 1e-09"):
        measured_captions(world_of("letters"), Data(held_out=1e-9))


def test_training_and_table_share_no_caption_of_a_folder(tmp_path):
    for k in range(40):
        image(tmp_path / f"{k % 3}" / f"{k:02d}.png", colour=(6 * k, 0, 0), caption=f"wall {k}")
    data = Data(source=str(tmp_path), held_out=SHARE)
    captions, measured = captions_of(data), evaluation_images(data)
    assert captions
    assert {p.caption for p in measured} == {f"wall {k}" for k in range(40)} - set(captions)
    for shown in measured:
        pixels = shown.pixels((16, 24))
        assert pixels.shape == (16, 24, 3)
        assert int(pixels[8, 8, 0]) == 6 * int(shown.caption.split()[1])
    assert captions_of(Data(source=str(tmp_path), held_out=SHARE, num_images=5)) == captions[:5]


def test_an_unusable_source_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no images with captions"):
        training_records(Data(source=str(tmp_path)), seed=0)
    with pytest.raises(ConfigError, match="which does not exist"):
        training_records(Data(source=str(tmp_path / "missing")), seed=0)
