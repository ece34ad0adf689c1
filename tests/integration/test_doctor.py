"""`stepdistill doctor` names everything that would stop a run, with its remedy, and writes nothing."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from eval.random_teacher import build
from stepdistill import stages
from stepdistill.cli import app, guarded
from stepdistill.config.load import load_config
from stepdistill.data.prepare import prepare
from stepdistill.doctor.findings import examine
from stepdistill.plan.disk_need import disk_need
from stepdistill.stages import open_run
from stepdistill.teacher.make import make_teacher
from stepdistill.teacher.source import teacher_facts
from tests.integration.conftest import tiny_config
from tests.integration.test_teachers import configs_alone, style_lora
from tests.original_layout import original_state

CONFIGS = {"small": "sd15", "sd15": "sd15", "sd21_v": "sd21_v", "sdxl": "sdxl", "sdxl_24gb": "sdxl"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(generator.integers(0, 255, (80, 70, 3), dtype=np.uint8)).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"an image number {k}")
    return folder


def problems(config):
    return [finding for finding in examine(config) if finding.state == "problem"]


def run(*words):
    return guarded(lambda: app(list(map(str, words)), standalone_mode=True))


def test_nothing_is_wrong_with_the_demo_and_nothing_is_written(tmp_path, capsys):
    assert run("doctor", "configs/letters.yaml", f"output_dir={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0].split()[1] for line in lines} == {
        *("packages", "device", "run", "export", "teacher", "data", "evaluation", "disk")
    }
    assert all(line.startswith("ok ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_each_mistake_is_reported_with_its_remedy_and_does_not_hide_the_others(tmp_path, images, capsys):
    (images / "03.png").write_bytes(b"no image")
    (images / "04.txt").write_text(" ")
    options = [f"output_dir={tmp_path}", f"data.source={images}", "evaluation.features=inception:/nowhere"]
    assert run("doctor", "configs/letters.yaml", *options) == 2
    out, err = capsys.readouterr()
    assert "data: 1 image_unreadable (03.png: " in out
    assert "data: 1 caption_empty (04.png: an empty caption)" in out
    assert "/nowhere" in out
    assert out.count("fix: ") == 4  # the fourth is a note: none of so few images is held out
    assert "note     data: the table compares with training images\n" in out
    assert "3 problems to fix before this runs" in err


def test_small_images_long_captions_and_missing_repositories_are_notes(tmp_path, images, monkeypatch):
    (images / "00.txt").write_text("word " * 80)
    Image.new("RGB", (20, 20)).save(images / "01.png")
    options = [f"data.source={images}", "evaluation.real_images=null"]
    findings = {finding.about: finding for finding in examine(tiny_config(tmp_path, *options))}
    small = next(f for about, f in findings.items() if "are smaller than the 32 pixels" in about)
    assert (small.state, "data.min_side=32" in small.remedy) == ("note", True)
    assert any("captions of up to 80 words" in about for about in findings)
    absent = examine(tiny_config(tmp_path, "teacher.path=nobody/nothing", f"data.source={images}"))
    assert any(f.state == "note" and "nobody/nothing is not in the Hub's cache" in f.about for f in absent)


def test_a_run_that_needs_more_than_the_disk_has_is_a_problem(tmp_path):
    (tmp_path / "prompts.txt").write_text("a wall\na door\n")
    source = f"data.source={tmp_path / 'prompts.txt'}"
    config = tiny_config(tmp_path, source, "data.num_images=100000000000")
    assert [f.remedy for f in problems(config) if f.about.startswith("disk")]
    assert not [f for f in problems(tiny_config(tmp_path, source)) if f.about.startswith("disk")]


@pytest.mark.slow
def test_the_predicted_disk_need_is_close_to_what_a_run_takes(finished_run):
    """On the tiny ladder, whose images take one block of the disk each."""
    need = disk_need(finished_run, teacher_facts(finished_run))
    run_dir = finished_run.run_dir
    for part, expected in (("cache", need.cache), ("rungs", need.rungs), ("evaluation", need.evaluation)):
        blocks = sum(path.stat().st_blocks * 512 for path in (run_dir / part).rglob("*") if path.is_file())
        assert 0.5 * blocks < expected < 1.5 * blocks, (part, expected, blocks)


def test_remedies_name_the_key_that_helps(tmp_path, images):
    """Images of 70 x 80 with a config for larger ones: doctor and prepare both name the key that leaves them out."""
    options = [f"data.source={images}", "data.min_side=256", "data.num_images=null"]
    config = tiny_config(tmp_path, *options)
    (small,) = [f for f in problems(config) if "image_too_small" in f.about]
    assert "70 x 80; allowed: at least 256 pixels per side (data.min_side)" in small.about
    assert small.remedy.startswith("data.min_side (now 256), ")
    (least,) = [f for f in examine(config) if "as large as the 32 pixels to train on" in f.about]
    assert least.remedy == "data.min_side=16"
    with pytest.raises(ValueError, match=r"fix: data\.min_side \(now 256\), other samples"):
        prepare(config)
    large = tiny_config(tmp_path, options[0], options[2], "data.max_pixels=5000", "name=large")
    with pytest.raises(
        ValueError, match=r"5,000 pixels \(data\.max_pixels\).*fix: data\.max_pixels \(now 5000\)"
    ):
        prepare(large)


def test_a_missing_teacher_is_one_problem(tmp_path, capsys):
    assert run("doctor", "configs/letters.yaml", f"output_dir={tmp_path}", "teacher.path=teacher-x") == 2
    out, err = capsys.readouterr()
    assert "got 'teacher-x', but there is no folder at " in out
    assert "1 problem to fix" in err


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow_after_first
def test_the_shipped_configs_find_nothing_wrong_with_a_stand_in_teacher(tmp_path, images, name, capsys):
    build(CONFIGS[name], tiny=True).save_pretrained(tmp_path / "teacher")
    options = [f"teacher.path={tmp_path / 'teacher'}", f"output_dir={tmp_path}", f"data.source={images}"]
    options += ["data.min_side=32", "evaluation.features=reader", "evaluation.resize=torchmetrics"]
    assert run("doctor", f"configs/{name}.yaml", *options) == 0
    assert "problem" not in capsys.readouterr().out
    assert run("run", f"configs/{name}.yaml", "--dry-run", *options) == 0
    output = capsys.readouterr().out
    assert f"32 -> 8  single: {20 if name == 'small' else 100} updates x " in output
    assert not (tmp_path / name.replace("_", "-")).exists()


@pytest.mark.slow
def test_images_that_the_extractor_cannot_read_are_reported_before_drawing(tmp_path):
    """The reader takes 32 x 32 and does not resize; the tiny SD1.5 draws 64 x 64."""
    build("sd15", tiny=True).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    (tmp_path / "prompts.txt").write_text("a thing\n")
    options = [f"teacher.path={tmp_path / 'teacher'}", f"data.source={tmp_path / 'prompts.txt'}"]
    findings = examine(load_config("configs/letters.yaml", [f"output_dir={tmp_path}", *options]))
    assert not [f for f in findings if f.state == "problem"]
    (note,) = [
        f for f in findings if f.about.startswith("evaluation: no FID: there are no weights of Inception")
    ]
    assert "inception:FILE" in note.remedy
    options.append("evaluation.features=reader")
    config = load_config("configs/letters.yaml", [f"output_dir={tmp_path}", *options])
    problem = "evaluation.resize: reader takes 32 x 32 images, got 64 x 64"
    assert [f for f in examine(config) if f.state == "problem" and problem in f.about]
    better = load_config(
        "configs/letters.yaml", [f"output_dir={tmp_path}", *options, "evaluation.resize=torchmetrics"]
    )
    assert not [f for f in examine(better) if f.state == "problem"]


@pytest.mark.slow
def test_settings_meant_for_an_epsilon_teacher_are_noted_for_a_v_prediction_teacher(tmp_path, images):
    options = [f"output_dir={tmp_path}", f"data.source={images}", "evaluation.features=reader"]
    notes = {}
    for family in ("sdxl", "sd21_v"):
        build(family, tiny=True).save_pretrained(tmp_path / family)
        config = load_config("configs/sdxl.yaml", [*options, f"teacher.path={tmp_path / family}"])
        notes[family] = [finding for finding in examine(config) if finding.about.startswith("ladder.")]
    assert notes["sdxl"] == []
    (note,) = notes["sd21_v"]
    assert (note.state, note.remedy) == ("note", "ladder.4.start_timestep=null")
    named = load_config(
        "configs/sdxl.yaml",
        [
            *options,
            f"teacher.path={tmp_path / 'sd21_v'}",
            "ladder.0.phases.0.loss_space=epsilon",  # guidance alone, which epsilon teaches well
            "ladder.1.phases.0.loss_space=epsilon",
            note.remedy,
        ],
    )
    (note,) = [finding for finding in examine(named) if finding.about.startswith("ladder.")]
    assert note.remedy == "ladder.1.phases.0.loss_space=auto"
    mended = load_config(
        "configs/sdxl.yaml", [*options, f"teacher.path={tmp_path / 'sd21_v'}", "ladder.4.start_timestep=null"]
    )
    assert mended.ladder[4].start_timestep is None


def sd21_v_as(kind, place):
    """Overrides for the tiny v-prediction teacher as a folder, as one file with configs beside it, or with a LoRA."""
    folder = place / "sd21_v"
    build("sd21_v", tiny=True).save_pretrained(folder)
    if kind == "folder":
        return [f"teacher.path={folder}"]
    if kind == "lora":
        return [
            f"teacher.path={folder}",
            f'teacher.loras=[{{"path": "{style_lora(folder, place / "style")}"}}]',
        ]
    save_file(original_state(DiffusionPipeline.from_pretrained(folder)), place / "model.safetensors")
    configs = configs_alone(folder, place / "configs")
    return [f"teacher.path={place / 'model.safetensors'}", f"teacher.config={configs}"]


@pytest.mark.parametrize("kind", ["file", "lora"])
@pytest.mark.slow_after_first
def test_doctor_checks_a_teacher_that_prepare_must_write_first_like_one_in_a_folder(tmp_path, images, kind):
    """From the teacher's configs, doctor checks the ladder, the sizes of the images, the extractor and the disk."""
    options = [f"output_dir={tmp_path}", f"data.source={images}", "data.buckets=true", "data.min_side=8"]

    def examined(kind):
        config = load_config("configs/sdxl.yaml", [*options, *sd21_v_as(kind, tmp_path / kind)])
        findings = examine(config)
        assert not (tmp_path / "sdxl").exists()
        return findings, [
            f.about for f in findings if f.about.startswith(("ladder.", "data: ", "evaluation: "))
        ]

    as_folder, as_kind = examined("folder"), examined(kind)
    assert as_folder[1] == as_kind[1]
    assert [f for f in as_kind[0] if "ladder.4.start_timestep: 399" in f.about]
    assert [f for f in as_kind[0] if "images are cut to" in f.about]
    assert [f for f in as_kind[0] if f.about.startswith("evaluation: no FID")]
    assert [f for f in as_kind[0] if re.search(r"disk: .*\(teacher [\d.,]+ .iB", f.about)]


@pytest.mark.parametrize("kind", ["file", "lora"])
@pytest.mark.slow_after_first
def test_disk_need_counts_the_teacher_that_prepare_writes(tmp_path, kind):
    """A float16 teacher with a LoRA is written in float32."""
    (tmp_path / "prompts.txt").write_text("a wall\na door\n")
    options = [
        f"data.source={tmp_path / 'prompts.txt'}",
        "data.num_images=2",
        *sd21_v_as(kind, tmp_path / kind),
    ]
    base = tmp_path / kind / "sd21_v"
    DiffusionPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(base)
    config = tiny_config(tmp_path, *options)
    expected = disk_need(config, teacher_facts(config)).teacher
    open_run(config)
    folder = make_teacher(config)
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert expected == pytest.approx(weights, rel=0.05)


def test_an_invalid_repository_name_is_a_problem(tmp_path, images):
    config = tiny_config(tmp_path, "teacher.path=models/my--model", f"data.source={images}")
    assert [f for f in problems(config) if "'models/my--model', which is not a repository" in f.about]


def test_checks_that_need_the_configs_of_an_absent_teacher_are_noted_as_skipped(tmp_path, images):
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    options = [
        f"output_dir={tmp_path}",
        f"data.source={images}",
        f"teacher.path={tmp_path / 'model.safetensors'}",
    ]
    findings = examine(load_config("configs/sd15.yaml", options))
    for part in ("ladder", "evaluation"):
        assert [
            f
            for f in findings
            if f.state == "note" and f.about.startswith(part) and "configs are on" in f.about
        ]


def test_settings_that_do_not_fit_the_teacher_are_logged_when_the_run_begins(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a wall\na door\n")
    options = [*sd21_v_as("folder", tmp_path), f"data.source={tmp_path / 'prompts.txt'}", "data.num_images=2"]
    config = tiny_config(tmp_path, *options, "ladder.4.start_timestep=399")
    stages.prepare(config)
    assert "prepare: ladder.4.start_timestep: 399 makes an error of epsilon weigh less" in caplog.text
    assert "fix: ladder.4.start_timestep=null" in caplog.text
