import dataclasses
import shutil

import numpy as np
import pytest
import torch

from stepdistill.config import ConfigError, LoraRow
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import Row, lora_row, lora_scheduler, rows_of
from stepdistill.evaluation.draw.sampler import Sampler, draw
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from stepdistill.runtime import Processes
from tests.integration.conftest import tiny_config
from tests.integration.launched import TORCHRUN, ended

PROMPTS = ["a red letter a on white", "a blue letter b on gray", "a black letter z on pink"] * 5


def with_batch(config, size):
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": size})})


def make(config, folder, row, *, size=64, prompts=PROMPTS, seed=5):
    sampler = Sampler(with_batch(config, size))
    return sampler.ensure(row, folder, prompts, seed=seed, processes=Processes())


def pixels(folder):
    return torch.cat(list(RowImages(folder).batches(len(PROMPTS)))).int()


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "images").glob("*.png"))}


def test_image_k_does_not_depend_on_the_batch_size(trained_run, tmp_path):
    row = Row("student-4", 4, 1.0, 4)
    for size in (1, 7, 64):
        make(trained_run, tmp_path / str(size), row, size=size)
    expected, latents = pixels(tmp_path / "64"), RowImages(tmp_path / "64").latents()
    for size in ("1", "7"):
        assert torch.allclose(RowImages(tmp_path / size).latents(), latents, atol=1e-4)
        assert (pixels(tmp_path / size) - expected).abs().max() <= 1
    assert (expected[0] - expected[3]).abs().max() > 50  # equal prompts, other noise: other images


def test_images_are_rounded_to_8_bit_not_truncated(trained_run, tmp_path):
    """The measured pixels are round(255 x) of the pipeline's floats; truncation would darken them by half a grey level."""
    row = Row("teacher-2", 2, 3.0)
    make(trained_run, tmp_path / "drawn", row)
    sampler = Sampler(with_batch(trained_run, 64))
    pipeline = sampler._ready(row)
    floats, _ = draw(pipeline, PROMPTS, steps=2, guidance_scale=3.0, seed=5, first=0, output_type="np")
    exact = torch.from_numpy(np.asarray(floats)).permute(0, 3, 1, 2).double() * 255
    drawn = pixels(tmp_path / "drawn").double()
    assert (drawn - exact).abs().max() <= 0.5 + 1e-4
    assert (drawn - exact).mean().abs() < 0.05 < (exact - exact.floor()).mean()


def test_interrupted_drawing_resumes_and_gives_the_same_images(trained_run, tmp_path, monkeypatch):
    row = Row("student-2", 2, 1.0, 2)
    make(trained_run, tmp_path / "whole", row, size=4)
    real_add, calls = RowImages.add, []

    def add_twice(self, *args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        real_add(self, *args, **kwargs)

    monkeypatch.setattr(RowImages, "add", add_twice)
    with pytest.raises(KeyboardInterrupt):
        make(trained_run, tmp_path / "again", row, size=4)
    monkeypatch.undo()
    folder = RowImages(tmp_path / "again")
    assert folder.missing(len(PROMPTS), 4) == [range(8, 12), range(12, 15)]
    stamp = (folder.path / "images" / "000000.png").stat().st_mtime_ns
    make(trained_run, tmp_path / "again", row, size=4)
    assert (folder.path / "images" / "000000.png").stat().st_mtime_ns == stamp
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "whole")
    assert torch.equal(folder.latents(), RowImages(tmp_path / "whole").latents())


@pytest.fixture
def one_thread():
    """One thread, as under torchrun: sums are then equal, and two processes do not compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_draw_the_same_images(trained_run, tmp_path):
    """Under torchrun each process draws its share, and every row equals that drawn by one process."""
    config = tiny_config(trained_run.output_dir, "evaluation.batch_size=4")
    alone = tmp_path / "alone"
    for row in rows_of(config)[3:6]:
        make(config, alone / row.name, row, size=4, prompts=PROMPTS[:10])
    script = f"""
from pathlib import Path
import torch
torch.set_num_threads(1)
from stepdistill.config.saved import read_run_config
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.evaluation.draw.rows import rows_of
from stepdistill.runtime import Processes
config = read_run_config(Path({str(config.run_dir)!r}))
config = config.model_copy(update={{"evaluation": config.evaluation.model_copy(update={{"batch_size": 4}})}})
processes = Processes()
sampler = Sampler(config, device=processes.device)
drawn, draw = [], sampler.draw
sampler.draw = lambda row, prompts, **keys: (drawn.append(len(prompts)), draw(row, prompts, **keys))[1]
for row in rows_of(config)[3:6]:
    sampler.ensure(row, Path({str(tmp_path)!r}) / "two" / row.name, {PROMPTS[:10]!r}, seed=5, processes=processes)
(Path({str(tmp_path)!r}) / f"drawn{{processes.is_main}}").write_text(str(sum(drawn)))
"""
    (tmp_path / "draw.py").write_text(script)
    code, errors = ended(TORCHRUN, str(tmp_path / "draw.py"))
    assert code == 0, errors[-2000:]
    assert [int((tmp_path / f"drawn{main}").read_text()) for main in (True, False)] == [3 * 8, 3 * 2]
    for row in rows_of(config)[3:6]:
        markers = list((tmp_path / "two" / row.name / "chunks").glob("*.json"))
        assert len(markers) == 3
        assert bytes_of(tmp_path / "two" / row.name) == bytes_of(alone / row.name)


def test_rows_are_drawn_once_and_again_when_something_changed(trained_run, tmp_path):
    row = Row("again", 1, 1.0)
    first = make(trained_run, tmp_path / "again", row)
    stamp = (tmp_path / "again" / "images" / "000000.png").stat().st_mtime_ns
    assert make(trained_run, tmp_path / "again", row) == first
    assert (tmp_path / "again" / "images" / "000000.png").stat().st_mtime_ns == stamp
    other = make(trained_run, tmp_path / "again", row, prompts=["a red letter b on white"] * 3)
    assert other["key"] != first["key"]
    assert len(bytes_of(tmp_path / "again")) == 3


@pytest.mark.slow
def test_a_lora_row_with_a_copy_of_a_rung_equals_the_students_row(trained_run, tmp_path):
    """With the scheduler beside the LoRA, or with DDIM, trailing timesteps and no guidance, the images are bit-identical."""
    lora = LoraRow(name="copy", path=str(rung_folder(trained_run.run_dir, 4)), steps=4)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(rung_folder(trained_run.run_dir, 4) / WEIGHT_NAME, alone)
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    plain = LoraRow(name="plain", path=str(alone), steps=4, scheduler_options=options)
    make(trained_run, tmp_path / "plain", lora_row(plain))
    make(trained_run, tmp_path / "copy", lora_row(lora))
    make(trained_run, tmp_path / "rung", Row("student-4", 4, 1.0, 4))
    assert bytes_of(tmp_path / "plain") == bytes_of(tmp_path / "rung")
    assert bytes_of(tmp_path / "copy") == bytes_of(tmp_path / "rung")
    half = dataclasses.replace(lora_row(lora), lora_scale=0.5)
    make(trained_run, tmp_path / "half", half)
    assert bytes_of(tmp_path / "half") != bytes_of(tmp_path / "rung")
    sampler, again = Sampler(with_batch(trained_run, 64)), lora_row(lora)
    for row in (half, again):  # another weight, then the first one: the LoRA is read once
        sampler.ensure(row, tmp_path / f"at{row.lora_scale}", PROMPTS, seed=5, processes=Processes())
    assert bytes_of(tmp_path / "at0.5") == bytes_of(tmp_path / "half")
    assert bytes_of(tmp_path / "at1.0") == bytes_of(tmp_path / "rung")
    nothing = dataclasses.replace(lora_row(lora), lora_scale=0.0)
    make(trained_run, tmp_path / "nothing", nothing)
    make(trained_run, tmp_path / "teacher", Row("teacher-4", 4, 1.0))
    assert np.abs((pixels(tmp_path / "nothing") - pixels(tmp_path / "teacher")).numpy()).max() <= 1


def test_a_lora_row_uses_the_scheduler_and_timesteps_given_for_it(trained_run, tmp_path):
    path = str(rung_folder(trained_run.run_dir, 4))
    lcm = LoraRow(name="lcm", path=path, steps=4, scheduler="LCMScheduler", scheduler_options={})
    explicit = LoraRow(**lcm.model_dump() | {"name": "dmd2", "timesteps": (999, 749, 499, 249)})
    for lora in (lcm, explicit):
        make(trained_run, tmp_path / lora.name, lora_row(lora))
    assert bytes_of(tmp_path / "lcm") != bytes_of(tmp_path / "dmd2")


@pytest.mark.parametrize(
    ("more", "spacing"),
    [
        ({}, "trailing"),
        ({"scheduler": "EulerDiscreteScheduler"}, "trailing"),
        ({"scheduler": "LCMScheduler", "scheduler_options": {}}, "leading"),
    ],
)
def test_a_lora_rows_timesteps_are_trailing_by_default(tmp_path, more, spacing):
    lora = LoraRow(name="x", path=str(tmp_path / "x.safetensors"), steps=4, **more)
    base = {"timestep_spacing": "leading", "beta_schedule": "scaled_linear"}
    assert lora_scheduler(lora, base).config.timestep_spacing == spacing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere.safetensors"}, "allowed: a .safetensors file"),
        ({"path": "."}, "pytorch_lora_weights.safetensors"),
        ({"scheduler": "NoScheduler"}, "allowed: a class of diffusers"),
        ({"scheduler": "UNet2DConditionModel"}, "allowed: a class of diffusers"),
    ],
)
def test_a_lora_row_with_wrong_values_is_refused_in_one_line(trained_run, change, message):
    valid = {"name": "x", "path": str(rung_folder(trained_run.run_dir, 4)), "steps": 4}
    with pytest.raises(ConfigError, match=message) as caught:
        lora_row(LoraRow(**valid | change))
    assert "\n" not in str(caught.value)


def test_nfe_counts_guidance_twice(trained_run):
    rows = {row.name: row.nfe for row in rows_of(trained_run)}
    assert rows["teacher-32"] == 64
    assert rows["student-4"] == 4
