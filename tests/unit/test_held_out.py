"""Which captions are held out by default: when, how many, and what the report says about them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.config import Data
from stepdistill.config.load import load_config
from stepdistill.data.held_out import (
    AUTO_SHARE,
    MAX_LOOKED_AT,
    held_out_share,
    is_held_out,
    leaves_enough,
    measured_data,
    settled,
)
from stepdistill.data.records import Record
from stepdistill.data.source import evaluation_images, training_records
from stepdistill.evaluation.evaluation_set import evaluation_set_of
from stepdistill.report.markdown import markdown
from stepdistill.stages import check_run, open_run


def images(folder, captions, *, first=0):
    """A folder with one small image, and a row of metadata.jsonl with it for each caption."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "wall.png")
    rows = [json.dumps({"file_name": "wall.png", "text": caption}) for caption in captions]
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("".join(f"{row}\n" for row in rows))
    return str(folder)


def numbered(count):
    return [f"wall {k}" for k in range(count)]


def config_of(tmp_path, source, *overrides):
    options = [f"output_dir={tmp_path / 'runs'}", f"data.source={source}", "data.num_images=null"]
    return load_config("configs/letters.yaml", [*options, "evaluation.num_images=50", *overrides])


def test_a_twentieth_of_the_captions_is_held_out_if_there_are_enough(tmp_path):
    data = Data(source=images(tmp_path / "many", numbered(1600)))
    assert held_out_share(data) == AUTO_SHARE
    trained = {record.read_caption() for record in training_records(data, seed=0)}
    measured = {image.caption for image in evaluation_images(data)}
    assert len(measured) >= 64
    assert trained | measured == set(numbered(1600))
    assert not trained & measured


@pytest.mark.parametrize("captions", [numbered(600), ["a dog", "a cat", "a bird"] * 600])
def test_few_images_or_few_captions_are_all_trained_on(tmp_path, captions):
    assert held_out_share(Data(source=images(tmp_path / "few", captions))) == 0


def test_a_caption_that_most_images_share_is_not_held_out_by_default(tmp_path):
    """The hash of this caption is in the share, so two thirds of the images would be held out."""
    shared = next(c for c in numbered(200) if is_held_out(c, AUTO_SHARE))
    mixed = [c for caption in numbered(1600) for c in (caption, shared, shared)]
    assert held_out_share(Data(source=images(tmp_path / "mixed", mixed))) == 0


@pytest.mark.parametrize("source", ["letters", "prompts.txt"])
def test_letters_and_prompt_files_hold_nothing_out_and_are_not_read(source):
    assert Data(source=source).held_out == 0.0
    assert Data(source=source, held_out=0.3).held_out == 0.3


def test_counting_captions_stops_as_soon_as_the_answer_is_clear():
    stream = iter([Record(str(k), lambda k=k: f"wall {k}", None) for k in range(9000)])
    assert leaves_enough(stream)
    assert len(list(stream)) > 7000
    stream = iter([Record(str(k), lambda: "a wall", None) for k in range(9000)])
    assert not leaves_enough(stream)
    assert len(list(stream)) == 9000 - MAX_LOOKED_AT


def test_a_run_keeps_the_share_that_it_began_with(tmp_path):
    source = images(tmp_path / "growing", numbered(100))
    auto, fixed = config_of(tmp_path, source), config_of(tmp_path, source, "data.held_out=0.2", "name=fixed")
    for config in (auto, fixed):
        open_run(config)
    check_run(auto.model_copy(update={"name": "fixed"}))
    open_run(config_of(tmp_path, source, "name=fixed"))
    assert "held_out: 0.2" in (fixed.run_dir / "config.yaml").read_text()
    assert settled(config_of(tmp_path, source, "name=fixed")).data.held_out == 0.2
    (auto.run_dir / "cache").mkdir()
    (auto.run_dir / "cache" / "manifest.json").write_text(json.dumps({"data": {"held_out": 0.0}}))
    images(Path(source), [f"house {k}" for k in range(2000)])
    assert held_out_share(auto.data) == AUTO_SHARE
    assert settled(auto).data.held_out == 0.0


def test_the_table_says_what_training_has_seen(tmp_path):
    few, many = images(tmp_path / "few", numbered(30)), images(tmp_path / "many", numbered(1600))
    trained = evaluation_set_of(config_of(tmp_path, few))
    assert trained.real.about == "30 images that were trained on, 32 x 32"
    assert trained.prompts_about == "captions that were trained on"
    assert "data.held_out" in trained.warnings[0]
    part = evaluation_set_of(config_of(tmp_path, few, "data.num_images=20", "evaluation.num_images=25"))
    assert part.real.about == "30 images of which the first 20 were trained on, 32 x 32"
    held_out = evaluation_set_of(config_of(tmp_path, many))
    assert held_out.real.about.endswith("images held out from training, 32 x 32")
    assert (held_out.prompts_about, held_out.warnings) == ("captions held out from training", ())
    letters = evaluation_set_of(config_of(tmp_path, "letters"))
    assert letters.prompts_about == "captions that were trained on"
    protocol = {"prompts": held_out.prompts_about, "real_images": held_out.real.about}
    assert f"Real images: {held_out.real.about}." in markdown("x", {"rows": [], "protocol": protocol})


def test_a_borrowed_cache_keeps_the_share_and_images_of_its_run(tmp_path):
    source = images(tmp_path / "many", numbered(1600))
    cache = tmp_path / "lender" / "cache"
    cache.mkdir(parents=True)
    lent = Data(source=source, held_out=0.1).model_dump(mode="json")
    (cache / "manifest.json").write_text(json.dumps({"data": lent}))
    config = config_of(tmp_path, str(cache))
    assert held_out_share(config.data) == 0.1
    assert measured_data(config) == Data(source=source, held_out=0.1)
    assert evaluation_set_of(config).real.about.endswith("images held out from training, 32 x 32")
    (tmp_path / "many" / "metadata.jsonl").unlink()
    (tmp_path / "many" / "wall.png").unlink()
    (tmp_path / "many").rmdir()
    assert measured_data(config).held_out == 0  # what is left are captions that were trained on
