"""`stepdistill plan`: profiles fit their cards, what would fit is named, wrong input ends with one line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from eval.full_size import CARDS
from stepdistill.cli import app, guarded
from stepdistill.config import ConfigError, Phase
from stepdistill.config.load import load_config
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import GIB, card_of
from stepdistill.plan.dry_update import DryRun, UpdateCost
from stepdistill.plan.other_stages import OtherStages
from stepdistill.plan.passes import phase_forwards, teacher_substeps
from stepdistill.plan.smaller import changed, savings, smaller_run
from stepdistill.plan.text import Costs, plan_text, verdict
from stepdistill.plan.tracker import Work
from stepdistill.plan.whole_run import PhaseCost, RunPlan, plan_run
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.families import plannable_facts
from stepdistill.teacher.folder import embedded_folder, teacher_kind

LETTERS = "configs/letters.yaml"
ONE_RUNG = (
    "ladder=[{teacher_steps: 8, student_steps: 4, phases: [{objective: mse, max_train_steps: 9}, "
    "{objective: single, max_train_steps: 9}]}]"
)
"""Two kinds of phases are enough where many plans are made."""
PEAKS = json.loads(Path("tests/plan/peaks.json").read_text())
FULL_SIZE = json.loads(Path("eval/results/full_size.json").read_text())
SMALLEST_MARGIN = 1.0
"""GiB that must be free beyond what the driver takes: for the working memory of kernels, and for fragments."""


def run(*arguments):
    return guarded(lambda: app(["plan", *arguments]))


def test_the_table_of_cards_lists_every_config_of_a_released_model():
    configs = {path.stem: load_config(str(path)) for path in Path("configs").glob("*.yaml")}
    assert sorted(CARDS) == sorted(k for k, c in configs.items() if teacher_kind(c.teacher.path) == "hub")


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_every_profile_fits_its_card_with_a_margin(name):
    """With the recorded peaks, which hold without the memory budget. It is filled on purpose, and smaller than the card."""
    config = load_config(f"configs/{name}.yaml")
    card = card_of(CARDS[name])
    other = OtherStages(config, plannable_facts(config), card)
    sizes = PEAKS[name] | {"prepare": other.prepare_bytes(), "evaluate": other.evaluate_bytes()}
    sizes["previews"] = FULL_SIZE[name]["stages"]["previews"]
    sizes["the budget"] = config.training.memory_budget_bytes or 0
    for what, size in sizes.items():
        assert size / GIB < card.usable_gib - SMALLEST_MARGIN, what


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_8gb", "sdxl_12gb"])
def test_a_plan_has_the_recorded_peaks_and_previews_that_fit_too(name):
    config = load_config(f"configs/{name}.yaml", ["training.memory_budget=null"])
    card = card_of(CARDS[name])
    planned = plan_run(config, plannable_facts(config), card)
    found = {cost.title: cost.update.peak for cost in planned.phases}
    assert found.items() >= PEAKS[name].items()
    assert {title.split(" ", 3)[3] for title in found} == {title.split(" ", 3)[3] for title in PEAKS[name]}
    assert planned.stages == pytest.approx(FULL_SIZE[name]["stages"], rel=1e-3)
    assert planned.peak / GIB < card.usable_gib - SMALLEST_MARGIN, planned.largest
    assert planned.has_previews


def test_the_plan_of_the_letters_names_memory_time_and_disk(capsys):
    assert run(LETTERS, "--gpu", "h100", "--price", "2") == 0
    text = capsys.readouterr().out
    assert "it fits" in text
    for part in (
        "base model",
        "student: moments",
        "discriminator: weights",
        "activations",
        "previews",
        "evaluate",
    ):
        assert part in text
    for title in ("32 -> 32 mse", "32 -> 8 single", "2 -> 1 mse"):
        assert title in text
    assert "time: training" in text
    assert "cost: " in text
    assert "at 2 an hour of a card" in text
    assert "of it to train the 8-step rung" in text
    assert "disk: " in text


def plan_of(training, evaluation, *, memory_gib, **changes):
    """A plan whose training and evaluation need so many GiB."""
    config = load_config("configs/sdxl_12gb.yaml", ["training.memory_budget=null"])
    peak, work = int(training * GIB), Work(1, 1.0, 1.0, 0, 1.0)
    update = UpdateCost(peak, {"base model": peak}, 0, {"student": work}, work)
    phase = PhaseCost(config.ladder[0], config.ladder[0].phases[0], update)
    stages = {"previews": 0, "evaluate": int(evaluation * GIB)}
    card = replace(card_of("12GB"), memory_gib=memory_gib, **changes)
    return RunPlan(config, card, [phase], stages, 0.0, 3600.0)


def text_of(plan):
    return plan_text(plan, disk=None, changes=None, costs=Costs())


def test_the_verdict_names_the_need_of_training_beside_that_of_drawing():
    assert "needs 9.0 GiB (evaluate; training 7.0)" in verdict(plan_of(7, 9, memory_gib=12))
    assert "needs 9.0 GiB (32 -> 32 mse)" in verdict(plan_of(9, 7, memory_gib=12))


def test_a_run_that_does_not_fit_has_hours_if_it_fitted_and_the_names_of_other_profiles():
    small = text_of(plan_of(7, 9, memory_gib=6))
    assert "time, if it fitted: training" in small
    assert "made for this model and other cards: sdxl, sdxl_16gb, sdxl_24gb" in small
    fits = text_of(plan_of(7, 9, memory_gib=12))
    assert "time: training" in fits
    assert "made for" not in fits


def test_what_the_hours_leave_out_is_said():
    named = "a guess by its memory"
    assert named in text_of(plan_of(7, 9, memory_gib=12))
    assert named not in text_of(plan_of(7, 9, memory_gib=12, is_guess=False))
    assert "converts the quantised weights" in text_of(plan_of(7, 9, memory_gib=12))


@pytest.mark.slow
def test_more_cards_share_the_images_and_each_costs_its_hours(capsys):
    def costs(*options):
        assert run(LETTERS, "--gpu", "h100", "--price", "3600000", ONE_RUNG, *options) == 0
        found = re.findall(r"^(?:cost: |      )([\d,.]+) (?:at|of it)", capsys.readouterr().out, re.MULTILINE)
        return [float(number.replace(",", "")) for number in found]

    one, *rungs = costs()
    two, *rungs_of_two = costs("--cards", "2")
    assert rungs_of_two == pytest.approx([2 * cost for cost in rungs], rel=1e-3)
    assert two - sum(rungs_of_two) == pytest.approx(one - sum(rungs), rel=1e-3)  # of the images


@pytest.mark.slow
def test_what_would_fit_a_smaller_card_than_the_budget_is_a_smaller_budget():
    options = [
        "training.gradient_checkpointing=true",
        "training.memory_budget=2GiB",
        "training.train_batch_size=512",
    ]
    config = load_config(LETTERS, [*options, ONE_RUNG, "evaluation.batch_size=1"])
    facts, card = plannable_facts(config), replace(card_of("1GB"), memory_gib=2.0)
    plan = plan_run(config, facts, card, keeps=kept_modules(config, facts))
    assert not plan.fits
    changes, smaller = smaller_run(config, facts, plan)
    assert changes[0] == "training.memory_budget=1GiB"
    assert smaller.fits


@pytest.mark.slow
def test_images_that_do_not_fit_are_drawn_one_at_a_time_and_then_in_bfloat16():
    """SDXL at 1024 px in float32, one image at a time, needs more than 12 GB; in bfloat16 it does not."""
    config = load_config("configs/sdxl_24gb.yaml", ["evaluation.dtype=float32"])
    facts, card = plannable_facts(config), card_of("12GB")
    one_by_one, in_half = (change for change, relieves in savings(config) if relieves == "evaluate")
    assert one_by_one == ["evaluation.batch_size=1"]
    alone = changed(config, one_by_one)
    assert OtherStages(alone, facts, card).evaluate_bytes() > card.usable_gib * GIB
    assert OtherStages(changed(alone, in_half), facts, card).evaluate_bytes() < card.usable_gib * GIB
    assert [c for c, _ in savings(changed(config, in_half)) if c[0].startswith("evaluation.dtype")] == []


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_code_2_and_names_what_would():
    options = [ONE_RUNG, "training.train_batch_size=4096", "evaluation.batch_size=1"]
    config = load_config(LETTERS, options)
    card = card_of("1GB")
    facts = plannable_facts(config)
    plan = plan_run(config, facts, card)
    assert not plan.fits
    changes, smaller = smaller_run(config, facts, plan)
    assert smaller.fits
    assert changes[0].startswith("training.")
    checked = load_config(LETTERS, [*options, *changes])
    assert plan_run(checked, facts, card).peak == smaller.peak
    samples = checked.training.train_batch_size * checked.training.gradient_accumulation_steps
    assert samples == 4096


@pytest.mark.slow
def test_a_run_that_nothing_makes_fit_says_so(capsys, monkeypatch):
    monkeypatch.setattr("stepdistill.plan.cards._RESERVED_GIB", 0.999)
    assert run(LETTERS, "--gpu", "1GB", ONE_RUNG) == 2
    captured = capsys.readouterr()
    assert "what would fit: a smaller data.resolution, or a larger card" in captured.out
    assert captured.err.count("\n") == 1
    assert "too few" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LETTERS, "--gpu", "gtx"], "--gpu: got 'gtx'; allowed: h100"),
        (["configs/small.yaml"], "my-model"),
        (
            ["configs/sdxl.yaml", "teacher.path=org/unknown", "--gpu", "24GB"],
            "configs of 'org/unknown' are not on this disk",
        ),
    ],
)
def test_wrong_input_ends_with_one_line(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_measuring_prints_what_real_updates_take_beside_the_plan(capsys):
    assert run(LETTERS, "--gpu", "h100", "--measure", "training.train_batch_size=2") == 0
    lines = capsys.readouterr().out.split("measured on cpu")[1].splitlines()[1:]
    assert len(lines) >= 3
    assert all("planned" in line and "TFLOP/s" in line for line in lines)


CHECKPOINTED = ["training.gradient_checkpointing=true", "lora.rank=4"]


def peaks_of(config, keeps):
    dry_run = DryRun(config, plannable_facts(config), card_of("h100"))
    return {
        (rung.student_steps, number): dry_run.update(
            rung, phase, keeps=keeps.get((rung.student_steps, number), ())
        )
        for rung in config.ladder[1:2]
        for number, phase in enumerate(rung.phases)
    }


@pytest.mark.slow
def test_a_budget_is_filled_by_as_many_activations_as_fit():
    without = load_config(LETTERS, CHECKPOINTED)
    least = peaks_of(without, {})
    most = peaks_of(load_config(LETTERS, ["lora.rank=4"]), {})
    budget = (max(c.peak for c in least.values()) + max(c.peak for c in most.values())) / 2 / GIB
    config = load_config(LETTERS, [*CHECKPOINTED, f"training.memory_budget={budget:.3f}GiB"])
    keeps = kept_modules(config, plannable_facts(config))
    found = peaks_of(config, keeps)
    for place, cost in found.items():
        assert least[place].peak < cost.peak <= config.training.memory_budget_bytes
        assert most[place].total.flop <= cost.total.flop < least[place].total.flop
        kept, segments = keeps[place], DryRun(config, plannable_facts(config), card_of("h100")).segments()
        assert 0 < len(kept) <= len(segments)
        unused = config.training.memory_budget_bytes - cost.peak
        one_more = 3 * max(
            s.kept for s in segments
        )  # up to three passes of an update keep a module's activations
        assert len(kept) == len(segments) or unused <= max(one_more, 0.01 * budget * GIB)


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_loaded(tmp_path, capsys):
    options = [*CHECKPOINTED, f"output_dir={tmp_path}", "training.memory_budget=1MiB"]
    with pytest.raises(ConfigError, match=r"allowed: a size in GiB, such as 16GiB or 7\.5GiB"):
        load_config(LETTERS, options)
    options[-1] = "training.memory_budget=1GiB"
    big = [*options, "training.train_batch_size=4096"]
    assert guarded(lambda: app(["run", LETTERS, *big])) == 2
    error = capsys.readouterr().err
    assert "training.memory_budget: got 1 GiB, but 32 -> 8 single needs" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_budget_without_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="got a budget without gradient_checkpointing"):
        load_config(LETTERS, ["training.memory_budget=8GiB"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("sd15", True), ("sdxl", False)])
def test_the_plan_in_passes_agrees_with_the_arithmetic_counted(name, checkpointing):
    """passes.py, which needs no torch, counts in forward passes of the bare network with the same factors for all models."""
    options = [f"training.gradient_checkpointing={str(checkpointing).lower()}", "training.memory_budget=null"]
    config = load_config(f"configs/{name}.yaml", [*options, "training.train_batch_size=1"])
    dry_run = DryRun(config, plannable_facts(config), card_of("h100"))
    samples = config.training.train_batch_size * config.training.gradient_accumulation_steps
    guided = dry_run.update(config.ladder[0], config.ladder[0].phases[0])
    bare = guided.work["teacher"].flop / samples / 2  # two passes of the base model
    for rung, phase in (
        (config.ladder[0], config.ladder[0].phases[0]),
        (config.ladder[2], config.ladder[2].phases[0]),
        (config.ladder[1], config.ladder[1].phases[1]),
        (config.ladder[2], Phase(objective="dmd", inputs="own")),
        (config.ladder[1], config.ladder[1].phases[1].model_copy(update={"critic_updates": 5})),
    ):
        counted = dry_run.update(rung, phase).total.flop / samples / bare
        assert phase_forwards(config, rung, phase) == pytest.approx(counted, rel=0.2), phase.title


def test_the_peaks_that_are_recorded_are_those_of_the_profiles():
    assert sorted(json.loads(Path("tests/plan/peaks.json").read_text())) == sorted(CARDS)


@pytest.mark.parametrize(("precision", "each"), [("no", 16), ("bf16", 18)])
def test_the_training_of_a_smaller_base_is_planned(precision, each):
    """All its weights in float32, with half copies, gradients and two moments; the original beside it, in the ladder too."""
    config = load_config(
        "configs/letters_small.yaml", [f"training.mixed_precision={precision}", "output_dir=nowhere"]
    )
    facts = TeacherFacts.of_folder(embedded_folder("teacher"))
    plan = plan_run(config, facts, card_of("24GB"))
    first, *ladder = plan.phases
    assert first.title == "shrink output+denoise+l2"
    smaller, original = 2_287_684, 3_918_532
    student = sum(size for part, size in first.update.parts.items() if part.startswith("student: "))
    assert student == pytest.approx(each * smaller, rel=0.01)
    width = 4 if precision == "no" else 2
    assert first.update.parts["teacher: weights"] == width * original
    assert ladder[0].update.parts["teacher: weights"] > width * original
    assert ladder[0].update.parts["base model"] == pytest.approx(width * smaller, rel=0.02)
    assert first.update.total.flop > 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_work_of_every_part_of_an_update_is_counted_once(checkpointing):
    """Letters, mse: the student's part is all that is not the teacher's or the optimiser's. Own moves add forward passes of
    the student, (N - 1) / 2 of them, and nothing else."""
    config = load_config(
        "configs/letters.yaml", [f"training.gradient_checkpointing={str(checkpointing).lower()}"]
    )
    facts = TeacherFacts.of_folder(embedded_folder("teacher"))
    dry_run, rung = DryRun(config, facts, card_of("24GB")), config.ladder[2]
    plain = dry_run.update(rung, Phase(objective="mse")).work
    own = dry_run.update(rung, Phase(objective="mse", inputs="own")).work
    assert plain.keys() == {"teacher", "student", "optimiser"}
    assert own.keys() == {*plain, "own moves"}
    for part in plain:
        assert own[part].flop == plain[part].flop, part
    moves = teacher_substeps(rung, rung.teacher_steps, 1000)
    forward = plain["teacher"].flop / moves  # a pass with a LoRA, as the student's
    assert own["own moves"].flop == pytest.approx(1.5 * forward, rel=1e-6)
    # one pass forwards, nearly two backwards, as W + B A needs a gradient of its own, and what is computed again
    passes = plain["student"].flop / forward
    assert passes == pytest.approx(3.6 if checkpointing else 2.8, abs=0.05)
