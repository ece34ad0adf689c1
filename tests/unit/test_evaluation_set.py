"""The prompts and the real images that a table uses."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.evaluation.evaluation_set import ImageFolder, Renderings, evaluation_set_of
from stepdistill.evaluation.measure.image_sets import Distances
from stepdistill.evaluation.protocol import real_warnings


def config_with(*overrides):
    return load_config("configs/letters.yaml", ["evaluation.num_images=9", *overrides])


def test_the_letters_world_gives_its_prompts_and_real_images():
    evaluation_set = evaluation_set_of(config_with())
    assert len(evaluation_set.prompts) == 9
    assert evaluation_set.world.name == "letters"
    real, other = (torch.cat(list(s.batches(4))) for s in (evaluation_set.real, evaluation_set.other_real))
    assert real.shape == (9, 3, 32, 32)
    assert real.dtype == torch.uint8
    assert not torch.equal(real, other)
    assert evaluation_set.real.key != evaluation_set.other_real.key
    assert torch.equal(real, torch.cat(list(evaluation_set_of(config_with()).real.batches(9))))


def test_prompts_of_a_file_are_used_in_order_and_repeated(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n  <b>&amp;</b> ../../x  \n\u202eright to left\n".encode())
    evaluation_set = evaluation_set_of(config_with(f"evaluation.prompts={file}"))
    assert evaluation_set.prompts[:4] == ("a cat", "<b>&amp;</b> ../../x", "\u202eright to left", "a cat")
    assert len(evaluation_set.prompts) == 9
    assert evaluation_set.world is None
    assert evaluation_set.real is None


def test_letters_captions_in_a_file_have_renderings_as_real_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red letter a on white\na purple letter m on pink\n")
    evaluation_set = evaluation_set_of(config_with(f"evaluation.prompts={tmp_path / 'prompts.txt'}"))
    assert evaluation_set.real.captions[1] == "a purple letter m on pink"
    assert isinstance(evaluation_set.real, Renderings)


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\x00"])
def test_an_unusable_prompt_file_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"evaluation\.prompts") as caught:
        evaluation_set_of(config_with(f"evaluation.prompts={file}"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_real_images_may_have_several_sizes_and_kinds(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for k, (size, mode) in enumerate([((8, 6), "RGB"), ((8, 6), "RGBA"), ((5, 5), "L"), ((5, 5), "P")] * 2):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(
            tmp_path / "in" / f"{k}.png"
        )
    (tmp_path / "notes.txt").write_text("no image")
    folder = ImageFolder.open(str(tmp_path))
    assert [tuple(b.shape) for b in folder.batches()] == [(2, 3, 6, 8), (2, 3, 5, 5)] * 2
    key = folder.key
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "3.png")
    assert ImageFolder.open(str(tmp_path)).key != key


def test_a_folder_without_images_and_a_broken_image_are_named(tmp_path):
    with pytest.raises(ConfigError, match="holds 0 images"):
        ImageFolder.open(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"evaluation\.real_images: got '.*nope', which does not exist; allowed:"
    ):
        ImageFolder.open(str(tmp_path / "nope"))
    for name in "abcdefgh":
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ValueError, match=r"cannot read .*a\.png"):
        list(ImageFolder.open(str(tmp_path)).batches())


def test_a_folder_of_captioned_images_gives_its_prompts_and_real_images(tmp_path):
    """Prompts are the held-out captions in order, repeated; real images are their images at the teacher's size."""
    for k in range(80):
        Image.new("RGB", (50, 40), (3 * k, 0, 0)).save(tmp_path / f"{k:02d}.png")
        (tmp_path / f"{k:02d}.txt").write_text(f"wall {k}")
    options = [f"data.source={tmp_path}", "data.held_out=0.25", "evaluation.num_images=50"]
    evaluation_set = evaluation_set_of(load_config("configs/letters.yaml", options))
    captions = list(dict.fromkeys(evaluation_set.prompts))
    assert 8 <= len(captions) < 40
    assert evaluation_set.prompts == tuple(captions[k % len(captions)] for k in range(50))
    assert evaluation_set.world is None
    images = torch.cat(list(evaluation_set.real.batches()))
    assert images.shape == (len(captions), 3, 32, 32)
    assert images[:, 0, 0, 0].tolist() == [3 * int(caption.split()[1]) for caption in captions]
    # the floor of FID to real uses as many training images as a row has images
    second = torch.cat(list(evaluation_set.other_real.batches()))
    assert second.shape == (50, 3, 32, 32)
    shades = [set(some[:, 0, 0, 0].tolist()) for some in (second, images)]
    assert len(shades[0]) == 50
    assert not shades[0] & shades[1]
    assert max(shades[0]) - min(shades[0]) > 3 * 60  # chosen from the whole source, not only its beginning
    assert evaluation_set.other_real.about == "50 images that were trained on, 32 x 32"
    few = evaluation_set_of(load_config("configs/letters.yaml", [*options, "data.num_images=7"]))
    assert few.other_real is None
    before = evaluation_set.real.key
    Image.new("RGB", (50, 40), (9, 9, 9)).save(tmp_path / f"{int(captions[0].split()[1]):02d}.png")
    assert evaluation_set.real.key != before


def test_few_real_images_and_a_missing_floor_cause_warnings(tmp_path):
    for k in range(80):
        Image.new("RGB", (50, 40), (3 * k, 0, 0)).save(tmp_path / f"{k:02d}.png")
        (tmp_path / f"{k:02d}.txt").write_text(f"wall {k}")
    options = [f"data.source={tmp_path}", "evaluation.features=reader"]
    warnings_by_share = {}
    for share in (0, 0.25):
        config = load_config("configs/letters.yaml", [*options, f"data.held_out={share}"])
        distances = Distances(config.evaluation)
        warnings_by_share[share] = real_warnings(config.evaluation, evaluation_set_of(config), distances)
        dimension = distances.main.extractor.num_features
    of_few = (
        f"real images for {dimension} features: so few images do not determine the covariance that FID uses"
    )
    assert len(warnings_by_share[0]) == 2
    assert f"80 {of_few}" in warnings_by_share[0][0]
    assert (
        warnings_by_share[0][1] == "FID and KID to real have no floor: there is no second set of real images"
    )
    assert len(warnings_by_share[0.25]) == 1
    assert of_few in warnings_by_share[0.25][0]
    letters = config_with("evaluation.num_images=300", "evaluation.features=reader")
    assert real_warnings(letters.evaluation, evaluation_set_of(letters), distances) == []


def test_too_few_held_out_images_are_refused(tmp_path):
    for k in range(30):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{k:02d}.png")
        (tmp_path / f"{k:02d}.txt").write_text(f"wall {k}")
    with pytest.raises(ConfigError, match=r"data\.held_out: got 0\.1, which leaves \d images"):
        evaluation_set_of(
            load_config("configs/letters.yaml", [f"data.source={tmp_path}", "data.held_out=0.1"])
        )
