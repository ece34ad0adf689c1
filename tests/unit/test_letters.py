"""The letters world, its reader, and the embedded teacher."""

import numpy as np
import pytest
import torch

from stepdistill.demo import letters
from stepdistill.demo.reader import load_reader, prompt_accuracy
from stepdistill.demo.teacher import build_tokenizer, rendered_batch
from stepdistill.teacher.folder import embedded_folder, missing_parts


@pytest.fixture(scope="module")
def reader():
    return load_reader(embedded_folder("reader") / "model.fp16.safetensors")


def test_captions_read_back():
    triples = letters.all_triples()
    assert len(triples) == 520
    assert letters.Triple(12, 4, 2).caption == "a purple letter m on pink"
    assert [letters.parse_caption(t.caption) for t in triples] == triples
    with pytest.raises(ValueError, match="not a caption"):
        letters.parse_caption("a dog")


def test_a_image_depends_only_on_seed_and_index():
    triple = letters.Triple(0, 0, 0)
    first, again, other = (
        np.asarray(letters.render_at(triple, seed=s, index=i)) for s, i in ((1, 7), (1, 7), (1, 8))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_have_their_ink_and_paper():
    for triple in letters.sample_triples(40, seed=3):
        pixels = np.asarray(letters.render_at(triple, seed=3, index=0)).reshape(-1, 3).astype(int)
        paper = np.array(list(letters.PAPERS.values())[triple.paper])
        ink = np.array(list(letters.INKS.values())[triple.ink])
        assert (np.abs(pixels - paper).sum(1) < 6).mean() > 0.3
        assert np.abs(pixels - ink).sum(1).min() < 60


def test_a_style_changes_only_what_a_caption_does_not_fix():
    triple = letters.Triple(3, 1, 0)

    def image(index, **style):
        return np.asarray(letters.render_at(triple, seed=2, index=index, style=letters.Style(**style)))

    assert np.array_equal(image(0), np.asarray(letters.render_at(triple, seed=2, index=0)))
    fixed = {"typefaces": ("cmr10.ttf",), "angle": 0.0, "shift": 0.0}
    assert np.array_equal(image(0, cap_height=(0.7, 0.7), **fixed), image(1, cap_height=(0.7, 0.7), **fixed))

    def ink(pixels):
        return (np.abs(pixels.astype(int) - letters.PAPERS["white"]).sum(2) > 200).mean()

    assert ink(image(0, cap_height=(0.4, 0.4), **fixed)) < 0.5 * ink(image(0, cap_height=(0.8, 0.8), **fixed))


def test_every_caption_is_drawn_equally_often():
    triples = letters.sample_triples(1040, seed=0)
    assert sorted(triples.count(t) for t in set(triples)) == [2] * 520


def test_the_reader_reads_new_renderings(reader):
    images, labels = rendered_batch(520, seed=987)
    expected = [letters.Triple(*row) for row in labels.tolist()]
    assert prompt_accuracy([images], expected, reader=reader) >= 0.995
    assert prompt_accuracy([images], expected[1:] + expected[:1], reader=reader) < 0.05


def test_the_reader_reads_images_of_another_size(reader):
    images, labels = rendered_batch(100, seed=5)
    larger = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    asked = [letters.Triple(*row) for row in labels.tolist()]
    assert prompt_accuracy([larger], asked, reader=reader) >= 0.98


def test_the_reader_refuses_floats(reader):
    with pytest.raises(ValueError, match="uint8"):
        reader(torch.zeros(1, 3, 32, 32))


def test_the_tokenizer_makes_a_token_of_each_word_and_reads_any_text():
    tokenizer = build_tokenizer()
    for triple in letters.all_triples():
        assert len(tokenizer(triple.caption).input_ids) == 6 + 2
    assert len(tokenizer("a dog é").input_ids) > 4


def test_the_embedded_teacher_is_complete_and_small():
    folder = embedded_folder("teacher")
    assert missing_parts(folder) == []
    assert (folder / "README.md").is_file()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 10e6
