"""The report names the phase that changed sharpness, contrast or colour, and advises only what the numbers support."""

import json

import pytest

from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import read_sealed, write_sealed
from stepdistill.report.advice import advice_for
from stepdistill.report.looks_by_phase import changes, looks_table
from stepdistill.report.page import render_page
from stepdistill.report.read import read_run
from tests.browser.synthetic_run import results_of, save, write_looks, write_training

ADVERSARIAL = "tests/assets/letters_adversarial.yaml"
PHASES = ("mse", "paired", "single")


def blurred(run, *, drift=-0.2, steps=(4,), look="sharpness"):
    """The report's advice after the rows of these steps are changed to drift in one look."""
    results = results_of(["a red letter a on white"])
    for row in results["rows"]:
        if row["kind"] == "student" and row["steps"] in steps:
            row[f"{look}_drift"] = drift
    save(run, results)
    return advice_for(read_run(run))


@pytest.fixture
def run(tmp_path):
    write_training(tmp_path / "letters", config=ADVERSARIAL)
    (tmp_path / "letters" / "evaluation").mkdir()
    return tmp_path / "letters"


@pytest.fixture
def mse_only(tmp_path):
    """A run without adversarial phases whose losses stopped falling long before the end."""
    config = resolved(load_config("configs/letters.yaml"))
    for rung in config["ladder"]:
        rung["phases"] = rung["phases"][:1]
    (tmp_path / "it.yaml").write_text(json.dumps(config))
    write_training(tmp_path / "letters", config=str(tmp_path / "it.yaml"))
    flatten_losses(tmp_path / "letters")
    (tmp_path / "letters" / "evaluation").mkdir()
    return tmp_path / "letters"


def flatten_losses(run):
    log = run / "log.jsonl"
    lines = [json.loads(line) | {"student_loss": 0.5} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def after(run, steps, place, **drift):
    """Writes drifts for the phases of a rung and of all later rungs, from phase `place` on."""
    phases = {8: PHASES, 4: PHASES, 2: PHASES, 1: ("mse", "single")}
    for rung, objectives in phases.items():
        for number, objective in enumerate(objectives):
            if rung < steps or (rung == steps and number >= place):
                write_looks(run, rung, number, objective, **drift)


def test_changes_by_phase_add_up_to_the_drift_and_have_errors(run):
    after(run, 8, 1, sharpness=-0.1, noise=0)
    after(run, 4, 2, sharpness=-0.3, noise=0)
    read = read_run(run)
    moves = changes(read, read.rungs[2], "sharpness")
    assert [str(move).partition(":")[0] for move in moves] == [
        "32 steps, phase 0, mse",
        *(f"{steps} steps, phase {place}, {kind}" for steps in (8, 4) for place, kind in enumerate(PHASES)),
    ]
    assert sum(move.by for move in moves) == pytest.approx(moves[-1].drift) == pytest.approx(-0.3)
    assert [move.by for move in moves[2:]] == pytest.approx([-0.1, 0, 0, 0, -0.2], abs=0.03)
    assert moves[-1].error == pytest.approx(0, abs=1e-12)  # every image has the same drift
    assert moves[-1].is_certain
    after(run, 4, 2, sharpness=-0.3, noise=0.5)
    scattered = read_run(run)
    assert changes(scattered, scattered.rungs[2], "sharpness")[-1].error > 0.1


def test_an_adversarial_phase_that_blurs_gets_fewer_updates_not_more(run):
    after(run, 4, 2, sharpness=-0.2)
    (advice,) = blurred(run, steps=(4, 2))
    assert advice.finding.startswith(
        "4 steps: 20 % less sharp than the teacher (largest change in 4 steps, phase 2, single: -"
    )
    assert (
        "; 2 steps: 20 % less sharp than the teacher (largest change in 4 steps, phase 2, single: -"
        in advice.finding
    )
    assert advice.changes == {
        "ladder.2.phases.2.learning_rate": 2.9e-05,
        "ladder.2.phases.2.max_train_steps": 10,
    }
    assert "fewer updates" in advice.remedy


def test_the_advice_names_the_training_images_if_the_phase_pulls_towards_them(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("real: teacher", "real: data"))
    after(run, 4, 2, sharpness=-0.2, data={"sharpness": -0.25})
    (advice,) = blurred(run)
    assert advice.remedy.startswith(
        "That phase pulls the student's images towards the training images, which differ"
    )
    after(run, 4, 2, sharpness=-0.2, data={"sharpness": 0.1})
    (advice,) = blurred(run)
    assert "training images" not in advice.remedy


def test_an_adversarial_phase_that_restored_sharpness_gets_more_updates(run):
    flatten_losses(run)
    after(run, 4, 0, sharpness=-0.4)
    after(run, 4, 1, sharpness=-0.2)
    (advice,) = blurred(run)
    assert "4 steps, phase 0, mse: -" in advice.finding
    assert advice.changes == {"ladder.2.phases.1.max_train_steps": 40}


def test_an_mse_phase_whose_loss_still_fell_gets_more_updates(run):
    after(run, 4, 0, sharpness=-0.4)
    after(run, 4, 1, sharpness=-0.2)
    (advice,) = blurred(run)
    assert advice.changes == {"ladder.2.phases.0.max_train_steps": 160}


def test_a_run_without_an_adversary_gets_no_advice_to_add_one(mse_only):
    for steps in (4, 2, 1):
        write_looks(mse_only, steps, 0, "mse", sharpness=-0.2)
    (advice,) = blurred(mse_only)
    assert advice.finding.startswith(
        "4 steps: 20 % less sharp than the teacher (largest change in 4 steps, phase 0, mse: -"
    )
    assert (advice.remedy, advice.changes) == ("", {})


def test_a_rung_gets_an_adversarial_phase_if_that_of_another_rung_restored_sharpness(tmp_path):
    config = resolved(load_config("configs/letters.yaml"))
    config["ladder"][2]["phases"] = config["ladder"][2]["phases"][:1]
    (tmp_path / "it.yaml").write_text(json.dumps(config))
    run = tmp_path / "letters"
    write_training(run, config=str(tmp_path / "it.yaml"))
    flatten_losses(run)
    (run / "evaluation").mkdir()
    write_looks(run, 4, 0, "mse", sharpness=-0.3)
    write_looks(run, 2, 0, "mse", sharpness=-0.3)
    write_looks(run, 2, 1, "single", sharpness=-0.3)
    write_looks(run, 1, 0, "mse", sharpness=-0.3)
    write_looks(run, 1, 1, "single", sharpness=-0.3)
    (advice,) = blurred(run, drift=-0.3)
    assert advice.remedy == ""
    write_looks(run, 2, 1, "single", sharpness=-0.05)
    (advice,) = blurred(run, drift=-0.3)
    assert advice.remedy.startswith("The adversarial phase at 2 steps increased sharpness (+")
    (setting,) = advice.settings
    then = load_config(tmp_path / "it.yaml", [setting])
    assert then.ladder[2].phases == (*then.ladder[2].phases[:1], then.ladder[3].phases[1])


@pytest.mark.parametrize("look", ["contrast", "colour"])
def test_contrast_and_colour_are_judged_by_phase_too(run, look):
    moved = {"contrast": 0.3, "colour": 20.0}[look]
    after(run, 4, 1, **{look: moved})
    (advice,) = blurred(run, drift=moved, look=look)
    start = {"contrast": "4 steps: 30 % more contrast", "colour": "4 steps: 20.0 grey levels away from"}[look]
    assert advice.finding.startswith(start)
    assert "(largest change in 4 steps, phase 1, paired: +" in advice.finding
    assert advice.keys == ("ladder.2.phases.1.learning_rate", "ladder.2.phases.1.max_train_steps")


def test_too_much_sharpness_is_attributed_to_the_phase_that_sharpened(run):
    after(run, 4, 1, sharpness=0.5)
    (advice,) = blurred(run, drift=0.5)
    assert advice.finding.startswith(
        "4 steps: 50 % sharper than the teacher (largest change in 4 steps, phase 1, paired: +"
    )
    assert advice.changes["ladder.2.phases.1.max_train_steps"] == 10


def test_without_numbers_by_phase_no_remedy_is_advised(run):
    (advice,) = blurred(run)  # the images at the phases' ends do not show it
    assert (advice.finding, advice.remedy) == ("4 steps: 20 % less sharp than the teacher.", "")
    after(run, 4, 2, sharpness=-0.2)
    (run / "rungs" / "8" / "previews" / "phase1-paired-end.json").unlink()
    (advice,) = blurred(
        run
    )  # the numbers of one 8-step phase are missing, so the change cannot be attributed
    assert (advice.finding, advice.remedy) == ("4 steps: 20 % less sharp than the teacher.", "")
    for path in run.glob("rungs/*/previews/*.json"):
        path.unlink()  # older versions did not write this file
    (advice,) = blurred(run)
    assert advice.remedy == ""
    assert looks_table(read_run(run)) is None


def test_a_change_within_its_error_is_not_attributed_to_a_phase(run):
    after(run, 4, 2, sharpness=-0.2, noise=1.0)
    (advice,) = blurred(run)
    assert advice.remedy == ""


@pytest.mark.parametrize("damage", ["", "null", "another digit", "one image", "another shape"])
def test_a_damaged_file_counts_as_missing(run, damage):
    path = run / "rungs" / "32" / "previews" / "phase0-mse-end.json"
    if damage == "another digit":
        path.write_text(path.read_text().replace("3.0", "4.0", 1))
    elif damage == "one image":
        looks = read_sealed(path)
        write_sealed(path, looks | {"compared_with": looks["compared_with"] | {"images": 1}})
    elif damage == "another shape":
        write_sealed(path, {"compared_with": {"images": 8}, "per_image": {"student": 3}})
    else:
        path.write_text(damage)
    assert blurred(run)[0].remedy == ""
    table = looks_table(read_run(run))
    assert table.lines[0].label == "8 steps, phase 0 (mse)"
    assert table.lines[0].cells[0].extra == ""


def test_numbers_from_other_images_are_not_compared(run):
    after(run, 4, 2, sharpness=-0.2)
    path = run / "rungs" / "32" / "previews" / "phase0-mse-end.json"
    looks = read_sealed(path)
    looks["compared_with"]["seed"] = 1
    write_sealed(path, looks)
    assert blurred(run)[0].remedy == ""


def test_the_page_shows_the_drift_of_each_phase(run):
    after(run, 4, 2, sharpness=-0.2, noise=0, data={"colour": 3.0})
    page = render_page([read_run(run)], columns=1)
    assert "8 images at the end of each phase, compared with the undistilled teacher&#39;s" in page
    start = page.index("4 steps, phase 2 (single)")
    assert "<td>-20 % <small>-" in page[start : start + 200]
    assert "training images" in page
