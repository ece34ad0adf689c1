"""A run that starts from another run's finished rung gets bit-identical weights to those that the other run gets."""

import shutil

import pytest

from stepdistill import stages
from stepdistill.config import ConfigError
from stepdistill.disk.durable import read_sealed
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from stepdistill.run.start_from import TAKEN
from stepdistill.teacher.folder import embedded_folder
from tests.integration.conftest import tiny_config


def weights(config, steps):
    return (rung_folder(config.run_dir, steps) / WEIGHT_NAME).read_bytes()


@pytest.mark.slow
def test_a_forked_run_gets_the_weights_that_the_first_run_gets(trained_run, tmp_path):
    """The second run starts from a copy of the first one, which is deleted before the second trains its last rung again."""
    first = tmp_path / "first"
    shutil.copytree(trained_run.run_dir / "rungs", first / "rungs")
    shutil.copy(trained_run.run_dir / "config.yaml", first)
    config = tiny_config(tmp_path, "name=other", f"start_from={rung_folder(first, 4)}")
    stages.prepare(config)
    stages.distill(config)
    for steps in (32, 8, 4, 2, 1):
        assert weights(config, steps) == weights(trained_run, steps), steps
    assert list((rung_folder(config.run_dir, 4) / "previews").glob("*.png"))
    assert not (rung_folder(config.run_dir, 4) / "kohya").exists()
    taken = read_sealed(config.run_dir / TAKEN)
    assert list(taken) == ["32", "8", "4"]
    assert taken["4"]["from"] == str(rung_folder(first, 4))
    assert taken["4"]["config"]["seed"] == config.seed
    shutil.rmtree(first)
    shutil.rmtree(rung_folder(config.run_dir, 1))
    stages.distill(config)
    assert weights(config, 1) == weights(trained_run, 1)
    page = (stages.report(config) / "index.html").read_text(encoding="utf-8")
    assert f"started from {rung_folder(first, 4)}" in page
    assert f"taken over from {rung_folder(first, 8)}" in page


def test_start_from_refuses_a_rung_of_another_base_and_a_damaged_rung(trained_run, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(trained_run.run_dir / "rungs" / "32", first / "rungs" / "32")
    teacher = tmp_path / "teacher"
    shutil.copytree(embedded_folder("teacher"), teacher)
    changed = next((teacher / "unet").glob("*.safetensors"))
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    other = tiny_config(
        tmp_path, "name=other", f"start_from={rung_folder(first, 32)}", f"teacher.path={teacher}"
    )
    with pytest.raises(ConfigError, match=r"start_from: the rung in .* belongs to the base"):
        stages.run_all(other)
    assert not (other.run_dir / "rungs").exists()
    damaged = rung_folder(first, 32) / WEIGHT_NAME
    damaged.write_bytes(damaged.read_bytes()[:-1])
    same = tiny_config(tmp_path, "name=same", f"start_from={rung_folder(first, 32)}")
    stages.open_run(same)
    with pytest.raises(
        ConfigError, match=r"pytorch_lora_weights\.safetensors is missing or not as it was written"
    ):
        stages.distill(same)
    assert not list((same.run_dir / "rungs").glob("*"))
