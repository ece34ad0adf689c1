"""Advice follows from the numbers and names existing keys of the config."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from stepdistill.config import RunConfig
from stepdistill.report.advice import advice_for
from stepdistill.report.proposals import setting
from stepdistill.report.read import read_run
from tests.browser.synthetic_run import load, make_run, replicates, save

ADVERSARIAL = "tests/assets/letters_adversarial.yaml"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "letters", config=ADVERSARIAL, columns=1)


def advised(run, **numbers):
    """Advice after student-4's row is changed to these numbers."""
    results = load(run)
    row = next(row for row in results["rows"] if row["row"] == "student-4")
    row |= numbers
    save(run, results)
    return advice_for(read_run(run))


def with_log(run, phase, **values):
    """Rewrites the log of a phase of the 4-step rung; each value is a function of the share of the phase that is over."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if (line["rung"], line["phase"]) == (4, phase)]
    for place, line in enumerate(chosen):
        line |= {key: value(place / len(chosen)) for key, value in values.items()}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def accuracy(value):
    return {"discriminator_accuracy_real": value, "discriminator_accuracy_student": value}


CURVES = json.loads(Path("tests/assets/destroyed_curves.json").read_text())


def with_curve(run, phase, name):
    """Puts a curve of a real run into the log of a phase of the 4-step rung."""
    curves = CURVES["curves"][name]
    with_log(run, phase, **{k: lambda share, v=v: v[int(share * len(v))] for k, v in curves.items()})


def test_good_numbers_cause_no_advice(run):
    assert advised(run) == []


def test_a_student_worse_than_the_bare_teacher_at_equal_passes_comes_first(run):
    bare = next(row for row in load(run)["rows"] if row["row"] == "teacher-2")["fid_to_teacher"]
    first = advised(run, fid_to_teacher=bare + 1)[0]
    assert (
        f"4 steps: FID to teacher {bare + 1:.2f}, worse than teacher-2's {bare:.2f} without any LoRA"
        in first.finding
    )
    assert first.keys == ("ladder.2.phases.0.max_train_steps",)
    assert not any("worse than" in advice.finding for advice in advised(run, fid_to_teacher=bare - 1))


@pytest.mark.parametrize(
    ("numbers", "finding", "key"),
    [
        (
            {"fid_to_teacher": 40.0},
            "4 steps: FID to teacher 40.00, 2.92 at the rung before",
            "ladder.2.phases.0.max_train_steps",
        ),
        (
            {"prompt_accuracy": 0.8},
            "4 steps: prompt accuracy 80 %, the teacher has 99 %",
            "ladder.2.phases.0.max_train_steps",
        ),
        (
            {"diversity": 0.6},
            "4 steps: images of different seeds differ 0.60 times",
            "ladder.2.phases.1.learning_rate",
        ),
    ],
)
def test_each_bad_number_gets_its_advice(run, numbers, finding, key):
    (advice,) = advised(run, **numbers)
    assert advice.finding.startswith(finding)
    assert key in advice.keys


def test_more_images_are_advised_if_a_difference_is_within_its_error(run):
    results = load(run)
    rows = {row["row"]: row for row in results["rows"]}
    rows["student-8"]["fid_to_teacher"], rows["student-4"]["fid_to_teacher"] = 2.7, 2.8
    results["replicates"]["student-4"]["fid_to_teacher"] = replicates(2.8, error=0.3)
    save(run, results)
    (advice,) = advice_for(read_run(run))
    assert advice.finding == (
        "FID to teacher: the order of student-8 and student-4 (2.70 and 2.80, the difference ± 0.20) may be chance."
    )
    assert advice.keys == ("evaluation.num_images",)


def test_a_significant_difference_is_not_called_chance_even_near_the_floor(run):
    results = load(run)
    rows = {row["row"]: row for row in results["rows"]}
    rows["student-8"]["fid_to_teacher"], rows["student-4"]["fid_to_teacher"] = 2.70, 2.75
    save(run, results)  # rows that move together: their difference has no error
    assert advice_for(read_run(run)) == []


def test_a_rung_far_above_the_floor_is_named_if_the_difference_is_certain(run):
    (advice,) = advised(run, fid_to_teacher=4.2)
    assert (
        advice.finding
        == "4 steps: FID to teacher 4.20, 2.92 at the rung before; floor (the teacher with other seeds): 2.60."
    )
    results = load(run)
    results["replicates"]["student-4"]["fid_to_teacher"] = replicates(4.2, error=5.0)
    save(run, results)
    assert not any("the rung before" in advice.finding for advice in advice_for(read_run(run)))


def test_results_of_a_version_that_measured_at_equal_noise_are_called_paired(run):
    results = load(run)
    del results["protocol"]["teacher_images"]
    for part in (results["metrics"], *results["rows"]):
        del part["paired_fid_to_teacher"]
    save(run, results)
    old = read_run(run)
    assert old.rows[6]["paired_fid_to_teacher"] == results["rows"][6]["fid_to_teacher"]
    assert "fid_to_teacher" not in old.rows[6]
    assert "fid_to_teacher" not in old.floor
    assert "at equal noise" in old.part("warnings")[-1]


def test_for_a_discriminator_at_chance_a_higher_rate_is_advised(run):
    with_log(run, 1, **accuracy(lambda share: 0.5))
    (advice,) = advised(run)
    assert advice.finding.startswith("4 steps, paired: the discriminator's accuracy is 50 %")
    assert advice.keys[0] == "ladder.2.phases.1.discriminator.learning_rate"
    assert "raise" in advice.remedy


def test_for_a_discriminator_too_far_ahead_a_lower_rate_is_advised(run):
    with_log(run, 2, **accuracy(lambda share: 0.6 + 0.4 * share), student_loss=lambda share: 1 + share)
    assert advised(run) == []
    with_log(run, 2, **accuracy(lambda share: 1.0), student_loss=lambda share: 1 + share)
    (advice,) = advised(run)
    assert advice.keys[0] == "ladder.2.phases.2.discriminator.learning_rate"
    assert "lower" in advice.remedy


def settings_before(run):
    config = read_run(run).config
    return lambda key: setting(config, key)


def test_a_student_that_its_learning_rate_destroyed_gets_a_lower_one_and_nothing_else(run):
    with_curve(run, 0, "student at 0.1")
    bad = {"fid_to_teacher": 400.0, "prompt_accuracy": 0.1, "sharpness_drift": -0.5}
    advice, before = advised(run, **bad), settings_before(run)
    assert advice[0].finding.startswith("4 steps, mse: the loss began at 0.028")
    assert "worse than teacher-2's" in advice[0].finding
    assert "prompt accuracy 10 %" in advice[0].finding
    assert advice[0].remedy == "The learning rate destroys the student: before anything else, lower it."
    rate = "ladder.2.phases.0.learning_rate"
    assert advice[0].changes == {rate: pytest.approx(0.1 * before(rate))}
    for each in advice:
        assert "ladder.2.phases.0.max_train_steps" not in each.keys
        assert each.changes.get(rate, 0) < before(rate)


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_a_discriminator_that_its_learning_rate_destroyed_gets_a_lower_one(run, loss):
    with_curve(run, 2, f"{loss} discriminator at 100 times its rate")
    (advice,), before = advised(run), settings_before(run)
    rate = "ladder.2.phases.2.discriminator.learning_rate"
    assert advice.changes == {rate: pytest.approx(0.1 * before(rate))}
    assert advice.remedy == "Its learning rate destroys the discriminator: lower it."


@pytest.mark.parametrize("share_right", [0.0, 0.3])
def test_a_relativistic_discriminator_below_chance_is_noticed(run, share_right):
    """Equal logits count as wrong, so one that tells nothing apart has an accuracy of 0."""
    with_log(run, 1, **accuracy(lambda share: share_right), discriminator_loss=lambda share: 0.693)
    (advice,) = advised(run)
    assert advice.changes["ladder.2.phases.1.discriminator.learning_rate"] > settings_before(run)(
        "ladder.2.phases.1.discriminator.learning_rate"
    )


def test_a_curve_of_a_healthy_student_causes_no_advice(run):
    with_curve(run, 0, "student at 0.001")
    assert advised(run) == []


@pytest.mark.parametrize(
    ("best", "key"), [(0.5, "phases.2.learning_rate"), (1.25, "phases.0.max_train_steps")]
)
def test_a_better_lora_scale_is_reported(run, best, key):
    results = load(run)
    results["scale_sweep"]["cells"].append({"row": "student-4", "scale": 1.25, "latent_mse_to_teacher": 0.35})
    for cell in results["scale_sweep"]["cells"]:
        if cell["row"] == "student-4" and cell["scale"] == best:
            cell["latent_mse_to_teacher"] = 0.05
    save(run, results)
    (advice,) = advice_for(read_run(run))
    assert advice.finding.startswith(
        f"4 steps: closer to the teacher at LoRA scale {best:g} (latent MSE 0.0500) than at scale 1 (0.1000)"
    )
    assert advice.keys[0] == f"ladder.2.{key}"


def test_similar_findings_are_merged_into_one_entry(run):
    results = load(run)
    for row in results["rows"]:
        if row["kind"] == "student" and row["steps"] in (4, 2):
            row["prompt_accuracy"] = 0.8
    save(run, results)
    (advice,) = advice_for(read_run(run))
    assert advice.finding == (
        "4 steps: prompt accuracy 80 %, the teacher has 99 %; 2 steps: prompt accuracy 80 %, the teacher has 99 %."
    )
    assert advice.settings == ("ladder.2.phases.0.max_train_steps=160",)


def test_every_advised_key_exists_in_the_config(run):
    with_log(run, 1, **accuracy(lambda share: 0.5))
    with_log(run, 2, **accuracy(lambda share: 1.0), student_loss=lambda share: 1 + share)
    results = load(run)
    for row in results["rows"]:
        if row["kind"] == "student":
            row |= {"fid_to_teacher": 900 / row["steps"], "sharpness_drift": -0.3, "contrast_drift": 0.3}
            row |= {"prompt_accuracy": 0.2, "diversity": 0.3}
    for cell in results["scale_sweep"]["cells"]:
        cell["latent_mse_to_teacher"] = 1 + cell["scale"]
    save(run, results)
    keys = [key for advice in advice_for(read_run(run)) for key in advice.keys]
    assert len(keys) > 12
    for key in keys:
        assert_is_a_key(key)


def assert_is_a_key(key):
    section = RunConfig
    for part in key.split("."):
        if part.isdigit():
            continue
        field = section.model_fields[part]
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), None)
