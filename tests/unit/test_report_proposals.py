"""Settings that the report proposes are accepted by the run's config, whatever is wrong with the run."""

import json
from pathlib import Path

import pytest
import yaml

from stepdistill.config.load import changed, load_config, parse_config
from stepdistill.config.saved import resolved
from stepdistill.report.advice import advice_for
from stepdistill.report.proposals import Advice, Proposal, accepted, scaled
from stepdistill.report.read import read_run
from tests.browser.synthetic_run import results_of, save, write_looks, write_training

CONFIGS = [*sorted(map(str, Path("configs").glob("*.yaml"))), "tests/assets/letters_adversarial.yaml"]
FROZEN = {"trunk": "frozen", "heads": "mid", "loss": "non_saturating"}
CARRIED = [
    {"objective": "mse"},
    {"objective": "single", "discriminator": FROZEN},
    {"objective": "single", "discriminator": FROZEN | {"start": "carried"}},
]


def mse_only(config):
    for rung in config["ladder"]:
        rung["phases"] = [phase for phase in rung["phases"] if phase["objective"] == "mse"]


def given_the_last_timestep(config):
    config["ladder"][-1]["start_timestep"] = None


def carried_discriminator(config):
    for rung in config["ladder"][1:]:
        rung["phases"] = CARRIED


# profiles for other cards have the same ladder
LADDERS = {json.dumps(yaml.safe_load(Path(path).read_text())["ladder"]): path for path in CONFIGS}
KINDS = [(path, None) for path in LADDERS.values()]
KINDS += [("configs/letters.yaml", how) for how in (mse_only, given_the_last_timestep, carried_discriminator)]

CHANCE = {"discriminator_accuracy_real": 0.5, "discriminator_accuracy_student": 0.5}
BLURRED = {"sharpness_drift": -0.3, "contrast_drift": -0.3, "colour_drift": 40.0, "prompt_accuracy": 0.2}
HARSH = {"sharpness_drift": 0.6, "contrast_drift": 0.4, "colour_drift": 40.0, "diversity": 0.3}
AHEAD = {"discriminator_accuracy_real": 1.0, "discriminator_accuracy_student": 1.0}
# Faults: changes of the rows, D's accuracy, the best LoRA scale, the loss, and the looks after mse and adversarial phases.
ILLS = {
    "undertrained": (
        BLURRED | {"clip_score": 1.0},
        CHANCE,
        1.25,
        lambda step: 1 / (step + 5),
        ({"sharpness": -0.4, "contrast": -0.3, "colour": 40.0}, {"sharpness": -0.2}),
    ),
    "overdone": (
        HARSH,
        AHEAD,
        0.5,
        lambda step: 1 + step / 1000,
        ({"sharpness": -0.1}, {"sharpness": 0.6, "contrast": 0.4, "colour": 40.0}),
    ),
}


def faulty_run(folder, path, change, faults):
    """A run of a config, unchanged or changed, in which every number is bad."""
    row_numbers, log_numbers, best_scale, loss, looks = ILLS[faults]
    config = resolved(load_config(path))
    if change is not None:
        change(config)
    config = resolved(parse_config(config))
    (folder / "it.yaml").write_text(yaml.safe_dump(config))
    write_training(folder / "run", config=str(folder / "it.yaml"))
    for rung in config["ladder"]:
        record = {"student_steps": rung["student_steps"], "prediction_type": "epsilon"}
        (folder / "run" / "rungs" / str(rung["student_steps"]) / "rung.json").write_text(json.dumps(record))
    log = folder / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line["student_loss"] = loss(line["step"])
        if line["objective"] in ("paired", "single"):
            line |= log_numbers
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rung in config["ladder"]:
        for place, phase in enumerate(rung["phases"]):
            drift = looks[phase["objective"] in ("paired", "single")]
            write_looks(folder / "run", rung["student_steps"], place, phase["objective"], **drift)
    results = results_of(["a red letter a on white"])
    for row in results["rows"]:
        row["clip_score"] = 30.0
        if row["kind"] == "student":
            row |= row_numbers | {"fid_to_teacher": 900 / row["steps"]}
    for cell in results["scale_sweep"]["cells"]:
        cell["latent_mse_to_teacher"] = 1.0
    cells = [
        {"row": f"student-{steps}", "scale": best_scale, "latent_mse_to_teacher": 0.1}
        for steps in (32, 8, 4, 2, 1)
    ]
    results["scale_sweep"]["cells"] += cells
    (folder / "run" / "evaluation").mkdir()
    save(folder / "run", results)
    return folder / "run"


@pytest.mark.parametrize("faults", ILLS)
@pytest.mark.parametrize(("path", "change"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.slow_after_first
def test_every_proposed_setting_is_accepted_by_the_config(tmp_path, path, change, faults):
    run = faulty_run(tmp_path, path, change, faults)
    advised = advice_for(read_run(run))
    before = load_config(tmp_path / "it.yaml")
    settings = [change for advice in advised for change in advice.changes.items()]
    keys = {key for key, _ in settings}
    assert len(keys) >= (6 if len(before.ladder) > 1 else 2)  # one rung: its rates and updates, at the least
    for key, value in settings:
        assert changed(resolved(before), {key: value}) != before
    for advice in advised[:3]:
        load_config(tmp_path / "it.yaml", list(advice.settings))  # as the command line reads them
    assert not any(key.endswith("prediction_type") for key in keys), "x0 at one step is 73 FID worse"
    for index, rung in enumerate(before.ladder):
        assert rung.start_timestep is None or f"ladder.{index}.node_steps" not in keys


def test_more_updates_keep_how_often_each_target_is_used():
    config = resolved(load_config("configs/letters.yaml"))
    phase = config["ladder"][4]["phases"][0]
    changes = scaled(config, 2, "ladder.4.phases.0.max_train_steps", "ladder.4.phases.1.max_train_steps")
    assert changes["ladder.4.phases.0.max_train_steps"] == 2 * phase["max_train_steps"]
    assert changes["ladder.4.phases.0.cached_updates"] == 2 * phase["cached_updates"]
    assert "ladder.4.phases.1.cached_updates" not in changes


def test_settings_that_the_config_refuses_are_not_proposed():
    config = resolved(load_config("configs/letters.yaml"))
    refused = Proposal("Other nodes.", {"ladder.4.node_steps": 4})
    taken = Proposal("More updates.", {"ladder.4.phases.0.max_train_steps": 400})
    both = Proposal(
        "Together alone.", {"ladder.4.start_timestep": None, "ladder.4.node_steps": 4}
    )  # one needs the other
    unknown = Proposal("Another key.", {"ladder.4.nodes": 4})
    advice = accepted(Advice("Bad.", (refused, taken, both, unknown)), config)
    assert advice.proposals == (taken,)
    assert advice.settings == ("ladder.4.phases.0.max_train_steps=400",)


def test_settings_that_do_not_fit_the_teacher_are_not_proposed(tmp_path):
    teacher = tmp_path / "teacher" / "scheduler"
    teacher.mkdir(parents=True)
    (teacher / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 400}))
    config = resolved(load_config("configs/letters.yaml", [f"teacher.path={teacher.parent}"]))
    config["ladder"][4]["start_timestep"] = None
    last, earlier = (Proposal("Use an earlier timestep.", {"ladder.4.start_timestep": t}) for t in (499, 199))
    assert accepted(Advice("Bad.", (last, earlier)), config).proposals == (earlier,)


def test_a_config_that_can_no_longer_be_read_gets_findings_without_settings():
    config = resolved(load_config("configs/letters.yaml")) | {"gone": 1}
    proposal = Proposal("More updates.", {"ladder.4.phases.0.max_train_steps": 400})
    assert accepted(Advice("Bad.", (proposal,)), config) == Advice("Bad.")
