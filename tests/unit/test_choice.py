"""The choice of feature extractor: the reader for letters only, others by what is on disk, or a reason for none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill.config import ConfigError
from stepdistill.config.load import load_config
from stepdistill.evaluation.evaluation_set import evaluation_set_of
from stepdistill.evaluation.measure.choice import choose_features
from stepdistill.evaluation.measure.image_sets import Distances
from stepdistill.evaluation.measure.trained import MIN_NET_IMAGES, trained_extractor, trained_facts
from stepdistill.evaluation.protocol import absent_columns, warnings_of
from tests.unit.test_held_out import images, numbered


@pytest.fixture(autouse=True)
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPDISTILL_INCEPTION", str(tmp_path / "nowhere.pt"))


def chosen(tmp_path, source, *overrides):
    options = [f"output_dir={tmp_path / 'runs'}", f"data.source={source}", "data.num_images=null"]
    config = load_config("configs/letters.yaml", [*options, *overrides])
    evaluation_set = evaluation_set_of(config)
    return config, evaluation_set, choose_features(config, evaluation_set)


def test_letters_are_measured_by_the_reader(tmp_path):
    config, evaluation_set, choice = chosen(tmp_path, "letters")
    assert (choice.spec, choice.warnings) == ("reader", ())
    assert Distances(choice.options(config)).main.extractor.name == "reader"
    lacking = {one["columns"]: one["why"] for one in absent_columns(config, evaluation_set, choice)}
    assert set(lacking) == {"patch FID", "CLIP score, CMMD", "PickScore", "FD-DINOv2"}


def test_other_images_are_measured_by_the_reader_only_if_the_config_names_it(tmp_path):
    source = images(tmp_path / "walls", numbered(30))
    config, evaluation_set, choice = chosen(tmp_path, source, "evaluation.features=reader")
    assert choice.spec == "reader"
    assert (
        "overlooks most damage"
        in warnings_of(config, evaluation_set, choice, Distances(choice.options(config)))[0]
    )
    config, evaluation_set, choice = chosen(tmp_path, source)
    assert choice.spec is None
    assert f"only 30 images to learn from, fewer than the {MIN_NET_IMAGES}" in choice.why
    assert "nowhere.pt" in choice.why
    lacking = {one["columns"]: one["why"] for one in absent_columns(config, evaluation_set, choice)}
    assert lacking["FID, KID, precision, recall, density, coverage, diversity"].startswith(choice.why)
    assert "prompt accuracy" in lacking
    assert Distances(choice.options(config)).main is None


def test_a_net_is_trained_if_there_are_enough_images(tmp_path):
    source = images(tmp_path / "walls", numbered(MIN_NET_IMAGES))
    config, _, choice = chosen(tmp_path, source)
    assert choice.learns
    assert not choice.is_named
    assert choice.options(config).features is None
    with pytest.raises(ConfigError, match=r"evaluation\.patch_size: got 64; allowed: 32"):
        chosen(tmp_path, source, "evaluation.patch_size=64")
    with pytest.raises(ConfigError, match=r"evaluation\.resize: got none"):
        chosen(tmp_path, source, "evaluation.resize=none")
    few = images(tmp_path / "few", numbered(20))
    with pytest.raises(ConfigError, match=r"evaluation\.features: got trained, but there are only 20 images"):
        chosen(tmp_path, few, "evaluation.features=trained")


def test_inception_is_preferred_if_its_weights_are_on_disk(tmp_path, monkeypatch):
    (tmp_path / "inception.pt").write_bytes(b"looked at when it is built")
    monkeypatch.setenv("STEPDISTILL_INCEPTION", str(tmp_path / "inception.pt"))
    _, _, choice = chosen(tmp_path, images(tmp_path / "walls", numbered(MIN_NET_IMAGES)))
    assert choice.spec == "inception"


def test_with_prompts_only_the_net_is_trained_on_the_real_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a wall\na door\n")
    (tmp_path / "real").mkdir()
    for k in range(MIN_NET_IMAGES):
        Image.fromarray(np.full((8, 8, 3), k % 256, dtype=np.uint8)).save(tmp_path / "real" / f"{k}.png")
    source, real = tmp_path / "prompts.txt", f"evaluation.real_images={tmp_path / 'real'}"
    assert chosen(tmp_path, source, real)[2].learns
    config, evaluation_set, choice = chosen(tmp_path, source)
    assert choice.spec is None
    named = chosen(tmp_path, source, "evaluation.features=reader")[2]
    lacking = {one["columns"]: one["why"] for one in absent_columns(config, evaluation_set, named)}
    assert (
        "set evaluation.real_images to a folder"
        in lacking["FID and KID to real, precision, recall, density, coverage"]
    )


@pytest.mark.slow
def test_the_net_of_a_run_is_stored_with_its_grades_and_retrained_for_other_images(tmp_path):
    source = tmp_path / "walls"
    source.mkdir()
    noise = np.random.default_rng(0)
    for k in range(MIN_NET_IMAGES):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).save(source / f"{k}.png")
        (source / f"{k}.txt").write_text(f"wall {k}")
    config, _, choice = chosen(tmp_path, source)
    options, facts = choice.learned(config)
    folder = config.run_dir / "evaluation" / "extractor"
    assert options.features == f"trained:{folder}"
    assert (facts["pictures"], facts["side"]) == (180, 32)
    assert facts["grades"]["among"] == 20
    assert facts["grades"]["found_again"] > 0.5
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert trained_extractor(config) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    Image.new("RGB", (40, 32)).save(source / "7.png")
    trained_extractor(config)
    assert (folder / "model.safetensors").stat().st_mtime_ns != stamp
    assert trained_facts(folder)["pictures"] == 180


def test_no_shipped_config_names_an_extractor_that_may_be_missing():
    for path in sorted(Path("configs").glob("*.yaml")):
        assert load_config(path).evaluation.features is None, path
