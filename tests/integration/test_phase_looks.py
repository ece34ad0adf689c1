"""Looks at the end of each phase: every rung's are compared with the undistilled teacher, and training is unchanged."""

import dataclasses
import json

import pytest
import torch

from stepdistill.config.load import load_config
from stepdistill.images.drift import image_drift
from stepdistill.ladder import load_shared
from stepdistill.models.shared_network import STUDENT
from stepdistill.report.looks_by_phase import changes
from stepdistill.report.read import read_run
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import Runtime
from stepdistill.training.measure_looks import PhaseLooks
from tests.integration.conftest import student_of


@pytest.fixture
def shared(trained_run):
    return load_shared(load_config(trained_run.run_dir), Runtime())


def looks_of_phase(run_dir, steps, name):
    return json.loads((rung_folder(run_dir, steps) / "previews" / f"{name}.json").read_text())


def test_every_phase_writes_its_drift_beside_its_preview(trained_run):
    for rung in trained_run.ladder:
        folder = rung_folder(trained_run.run_dir, rung.student_steps) / "previews"
        names = {f"phase{number}-{phase.objective}-end" for number, phase in enumerate(rung.phases)}
        assert {path.stem for path in folder.glob("*.json")} == names
        assert {path.stem for path in folder.glob("*.png")} == names
    read = read_run(trained_run.run_dir)
    moves = changes(read, read.rungs[-1], "sharpness")
    assert len(moves) == sum(len(rung.phases) for rung in trained_run.ladder)
    last = looks_of_phase(trained_run.run_dir, 1, "phase1-mse-end")
    assert sum(move.by for move in moves) == pytest.approx(last["sharpness_drift"], rel=1e-9)


def test_all_phases_are_compared_with_the_same_images(trained_run):
    first = looks_of_phase(trained_run.run_dir, 32, "phase0-mse-end")
    about = {"images": 2, "seed": 0, "teacher_steps": 32, "guidance_scale": 3.0}
    assert about.items() <= first["compared_with"].items()
    for steps in (8, 1):
        name = {8: "phase0-mse-end", 1: "phase1-mse-end"}[steps]
        later = looks_of_phase(trained_run.run_dir, steps, name)
        assert later["compared_with"] == first["compared_with"]
        assert later["per_image"]["teacher"] == first["per_image"]["teacher"]
        assert later["per_image"]["data"] == first["per_image"]["data"]


def looks_with(shared, *, guidance_scale, images=3):
    teacher = dataclasses.replace(shared.undistilled, guidance_scale=guidance_scale)
    return PhaseLooks(shared.painter, shared.cache, teacher, teacher_steps=2, images=images, seed=0)


def test_a_student_that_is_the_teacher_has_no_drift(shared, tmp_path):
    looks = looks_with(shared, guidance_scale=1.0)
    looks.write(tmp_path / "looks.json", student_of(shared), steps=2)
    written = json.loads((tmp_path / "looks.json").read_text())
    assert [written[f"{look}_drift"] for look in ("sharpness", "contrast", "colour")] == [0, 0, 0]
    assert written["per_image"]["student"] == written["per_image"]["teacher"]
    looks.write(tmp_path / "looks.json", student_of(shared), steps=1)
    assert json.loads((tmp_path / "looks.json").read_text())["colour_drift"] > 1


def test_the_stored_drift_equals_that_of_the_images(shared, tmp_path):
    looks = looks_with(shared, guidance_scale=3.0)
    looks.write(tmp_path / "looks.json", student_of(shared), steps=1)
    written = json.loads((tmp_path / "looks.json").read_text())
    conditioning, noise = looks._samples.conditioning, looks._noise
    mine = shared.painter.draw(student_of(shared), noise, conditioning, steps=1)
    theirs = shared.painter.draw(shared.undistilled, noise, conditioning, steps=2)
    expected = image_drift([mine], [theirs])
    assert {key: written[key] for key in expected} == expected


def test_drawing_the_looks_leaves_weights_random_state_and_adapters_unchanged(shared, tmp_path):
    model = shared.network.model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random_state, state = torch.get_rng_state(), shared.network.state
    trains = [p.requires_grad for p in shared.network.group(STUDENT).values()]
    shared.looks.write(tmp_path / "looks.json", student_of(shared), steps=2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert shared.network.state == state
    assert [p.requires_grad for p in shared.network.group(STUDENT).values()] == trains
    assert all(p.grad is None for p in model.parameters())


def test_without_images_no_drift_is_written(shared, tmp_path):
    looks_with(shared, guidance_scale=3.0, images=0).write(
        tmp_path / "looks.json", student_of(shared), steps=1
    )
    assert not list(tmp_path.iterdir())
