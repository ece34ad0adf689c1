"""The second reader: its committed weights agree with their record, and it measures a table's images."""

import json
import statistics

import numpy as np
import pytest
import second_reader
import torch
from PIL import Image

from stepdistill.config.load import load_config
from stepdistill.demo import letters
from stepdistill.demo.reader import load_reader
from stepdistill.disk.durable import sha256_file
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.evaluation_set import evaluation_set_of
from stepdistill.teacher.folder import embedded_folder

NUM_IMAGES = 64


def test_the_committed_reader_agrees_with_its_record():
    record = json.loads(second_reader.ASSET.with_suffix(".json").read_text())
    weights = second_reader.weights_of(second_reader.ASSET)
    assert sha256_file(weights) == record["sha256"]
    assert weights.stat().st_size < 1e6
    assert set(record["accuracy"]) == set(second_reader.TESTED)
    assert record["accuracy"]["the world's renderings"] >= 0.98
    trained = set(record["trained_on"]["typefaces"])
    unseen = set(second_reader.TESTED["the world's renderings in typefaces that it has not seen"].typefaces)
    assert not trained & unseen
    assert trained | unseen == set(letters.TYPEFACES)


def test_the_second_reader_reads_new_renderings_and_has_other_features():
    reader = load_reader(second_reader.weights_of(second_reader.ASSET))
    shares = second_reader.accuracies(reader, seed=4321, num_images=104)
    assert min(shares.values()) >= 0.95
    shipped = load_reader(embedded_folder("reader") / "model.fp16.safetensors")
    images = torch.randint(
        0, 255, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert not torch.allclose(reader.features(images), shipped.features(images), atol=1.0)


def draw(folder, images):
    images = [Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in images]
    row = RowImages(folder)
    row.begin(folder.name, {})
    row.add(0, images, torch.zeros(len(images), 4, 8, 8), seconds=1.0)


def test_a_table_is_measured_by_the_second_reader(tmp_path):
    config = load_config(
        "configs/letters.yaml", [f"output_dir={tmp_path}", f"evaluation.num_images={NUM_IMAGES}"]
    )
    triples = [letters.parse_caption(prompt) for prompt in evaluation_set_of(config).prompts]
    folder = config.run_dir / "evaluation"
    renderings = [letters.render_at(t, seed=99, index=i) for i, t in enumerate(triples)]
    draw(folder / "right", renderings)
    draw(folder / "floor", [letters.render_at(t, seed=98, index=i) for i, t in enumerate(triples)])
    draw(folder / "shuffled", renderings[1:] + renderings[:1])
    draw(folder / "blank", [np.full((32, 32, 3), 10 * (i % 20), np.uint8) for i in range(NUM_IMAGES)])
    again = second_reader.measured_again(config, ["right", "shuffled", "blank"])
    rows = again.rows
    assert rows["right"]["second_prompt_accuracy"] >= 0.95
    assert rows["shuffled"]["second_prompt_accuracy"] < 0.1
    for reference in ("real", "teacher"):
        key = f"second_fid_to_{reference}"
        assert rows["right"][key] == pytest.approx(rows["shuffled"][key], rel=1e-6)
        assert rows["right"][key] < 0.2 * rows["blank"][key]
    assert rows["right"]["second_fid_to_real"] < 2 * again.floor["second_fid_to_real"]
    for row, replicates in again.replicates.items():
        assert set(replicates) == {"prompt_accuracy", *rows[row]}
        assert all(len(values) == 8 for values in replicates.values())
        share = statistics.fmean(replicates["second_prompt_accuracy"])
        assert share == pytest.approx(rows[row]["second_prompt_accuracy"])
    assert second_reader.measured_again(config, ["right"]).rows["right"] == rows["right"]


def test_a_table_of_other_images_is_not_measured_again(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    config = load_config("configs/letters.yaml", [f"evaluation.prompts={tmp_path / 'prompts.txt'}"])
    assert second_reader.measured_again(config, ["teacher-32"]) == second_reader.Again({}, {}, {})
