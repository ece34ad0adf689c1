"""The planned cost of a run, compared with what the run does."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.config import ConfigError
from stepdistill.config.ladder import WeightedObjective
from stepdistill.config.load import load_config
from stepdistill.diffusion.variance_preserving import VariancePreserving
from stepdistill.plan import (
    describe,
    evaluation_forwards,
    measured_seconds_per_pass,
    phase_forwards,
    preparation_forwards,
    training_forwards,
)
from stepdistill.teacher.folder import embedded_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import variants
from peers import methods

CONFIGS = ("configs/letters.yaml", "configs/letters_lightning.yaml")


def mean_moves(timesteps, node_steps, student_steps, teacher_steps):
    """The mean number of network evaluations of a roll-out per start node."""
    path = VariancePreserving(torch.linspace(1, 0, timesteps, dtype=torch.float64))
    nodes = path.nodes(node_steps).tolist()
    moves = path.substeps(nodes, path.jump(nodes, student_steps), teacher_steps)
    return sum(len(move.timesteps) for move in moves) / len(nodes)


@pytest.mark.parametrize("path", CONFIGS)
def test_teacher_moves_are_counted_as_the_solver_takes_them(path):
    """The plan counts the mean length of the teacher's paths over the nodes that a rung trains at: times two bare U-Net
    passes for the guided base, times one LoRA pass for the student of another rung."""
    config = load_config(path)
    for rung in config.ladder:
        for phase in rung.phases:
            if phase.objective == "convert" or phase.discriminator.real == "data":
                continue
            teacher_steps = phase.teacher_steps or rung.teacher_steps
            moves = mean_moves(1000, rung.node_steps or rung.student_steps, rung.student_steps, teacher_steps)
            each = 2 if rung is config.ladder[0] else 1.083
            alone = {"mse": 1.083 + 1.268, "paired": 7.601, "single": 5.901}[phase.objective]
            once = phase.model_copy(update={"cached_updates": None})
            assert phase_forwards(config, rung, once) == pytest.approx(each * moves + alone, abs=1e-3)


def test_the_teacher_of_a_convert_phase_makes_one_prediction_guided_on_the_first_rung():
    last = load_config(CONFIGS[1]).ladder[-1]
    forwards = phase_forwards(load_config(CONFIGS[1]), last, last.phases[0])
    assert forwards == pytest.approx(1.083 + 1.083 + 1.268)
    first = ("prediction_type=sample", "phases.0.objective=convert", "phases.0.cached_updates=null")
    alone = load_config(CONFIGS[0], [f"ladder.0.{setting}" for setting in first])
    base = phase_forwards(alone, alone.ladder[0], alone.ladder[0].phases[0])
    assert base == pytest.approx(2 + 1.083 + 1.268)


def test_teacher_moves_are_counted_on_the_teachers_own_schedule(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(embedded_folder("teacher"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 45}))
    phases = "phases: [{objective: mse}]"
    ladder = f"ladder=[{{teacher_steps: 40, student_steps: 8, node_steps: 32, {phases}}}]"
    options = [ladder, "evaluation.teacher_steps=[8]", f"teacher.path={folder}"]
    config = load_config(CONFIGS[0], options)
    moves = mean_moves(45, 32, 8, 40)
    (rung,) = config.ladder
    assert phase_forwards(config, rung, rung.phases[0]) == pytest.approx(2 * moves + 2.351, abs=1e-3)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_of_the_ablations_is_a_ladder_of_equal_forwards(name):
    config = load_config(CONFIGS[0])
    budget = training_forwards(config)
    changed = variants.variant(name).config(config, budget, 1.0)
    assert training_forwards(changed) == pytest.approx(budget, rel=0.01)
    assert (changed.model_copy(update={"name": config.name}) == config) == (name == "default")


def test_lightnings_rungs_above_one_step_have_the_whole_budget():
    config = load_config(CONFIGS[0])
    budget = training_forwards(config)
    method = methods.methods()["lightning"]
    ladder = method.config(config, budget, 1.0)
    assert [rung.student_steps for rung in ladder.ladder] == [32, 8, 4, 2]
    assert training_forwards(ladder) == pytest.approx(budget, rel=0.01)
    assert [row.name for row in method.rows(ladder)] == ["lightning-8", "lightning-4", "lightning-2"]
    assert "no row at 1 step" in method.note


def test_several_objectives_share_the_passes_of_student_and_teacher():
    """mse together with an adversarial loss on the data costs as much as mse plus the discriminator."""
    config = load_config(CONFIGS[0], ["ladder.1.phases.0.cached_updates=null"])
    rung = config.ladder[1]
    mse, single = rung.phases
    both = single.model_copy(
        update={
            "objective": None,
            "objectives": (WeightedObjective(kind="mse"), WeightedObjective(kind="single")),
        }
    )
    assert phase_forwards(config, rung, both) == pytest.approx(phase_forwards(config, rung, mse) + 3.55)


def test_features_cost_a_prediction_of_the_teacher_unless_it_moves_anyway():
    config = load_config(CONFIGS[0], ["ladder.1.phases.0.cached_updates=null"])
    rung, mse = config.ladder[1], config.ladder[1].phases[0]
    alone, beside_mse = (
        mse.model_copy(
            update={"objective": None, "objectives": tuple(map(WeightedObjective.model_validate, of))}
        )
        for of in ([{"kind": "l2"}], [{"kind": "mse"}, {"kind": "l2"}])
    )
    assert phase_forwards(config, rung, beside_mse) == phase_forwards(config, rung, mse)
    assert phase_forwards(config, rung, alone) == pytest.approx(1.083 + 1.083 + 1.268)


def test_reusing_half_of_the_targets_halves_the_teachers_cost():
    config = load_config(CONFIGS[0], ["ladder.1.phases.0.cached_updates=null"])
    rung = config.ladder[1]
    phase = rung.phases[0]
    with_reuse = phase.model_copy(update={"cached_updates": phase.max_train_steps // 2})
    saved = phase_forwards(config, rung, phase) - phase_forwards(config, rung, with_reuse)
    assert saved == pytest.approx(0.5 * 4 * 1.083)


def last_number(line):
    return float(re.split(": | = ", line)[-1].removesuffix(" passes").replace(",", ""))


def test_the_parts_of_the_plan_add_up_to_the_remaining_passes():
    config = load_config(CONFIGS[0])
    lines = describe(config).splitlines()
    training = [line for line in lines if line.startswith("distill")]
    for line in training:
        updates, samples, each = re.findall(r"([\d.,]+) (?:updates|samples|passes =)", line)
        product = float(updates.replace(",", "")) * float(samples) * float(each)
        assert f"= {product:,.0f} passes" in line
    assert sum(map(last_number, training)) == pytest.approx(training_forwards(config), abs=len(training))
    total = f"in all     {training_forwards(config) + evaluation_forwards(config):,.0f} network passes"
    assert lines[-1].startswith(total)
    assert "times a pass" in lines[-1]
    remaining = describe(config, finished=[32, 8]).splitlines()
    assert "distill    32 -> 8  finished" in remaining
    expected = training_forwards(config, finished=[32, 8]) + evaluation_forwards(config)
    assert remaining[-1].startswith(f"in all     {expected:,.0f} network passes")


def test_the_plan_of_a_stage_has_only_its_part():
    config = load_config(CONFIGS[0])
    assert [line.split()[0] for line in describe(config, stages=["evaluate"]).splitlines()] == [
        *("run", "evaluate", "in")
    ]
    assert describe(config, stages=["report"]).count("\n") == 1
    one = describe(config, stages=["distill"], only=(32, 8), finished=[32, 8])
    assert [line.split()[:4] for line in one.splitlines()[1:-1]] == [["distill", "32", "->", "8"]] * 2
    with pytest.raises(ConfigError, match=r"--rung: got 16:8; allowed: 32:32, 32:8"):
        describe(config, stages=["distill"], only=(16, 8))


def test_hours_come_from_the_updates_that_the_run_has_logged(tmp_path):
    config = load_config(CONFIGS[0], [f"output_dir={tmp_path}"])
    assert measured_seconds_per_pass(config) is None
    config.run_dir.mkdir()
    rung = config.ladder[0]
    each = phase_forwards(config, rung, rung.phases[0])
    records = [
        {"rung": 32, "phase": 0, "step": step, "images_per_second": 1 / (each * seconds)}
        for step, seconds in enumerate((9.0, 0.25, 0.25))
    ]
    (config.run_dir / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    pace = measured_seconds_per_pass(config)
    assert pace == pytest.approx(0.25)
    hours = (training_forwards(config) + evaluation_forwards(config)) * 0.25 / 3600
    assert f"about {hours:,.1f} hours at 0.25 s a pass" in describe(config, seconds_per_pass=pace)


def test_images_that_the_teacher_draws_for_prompts_are_counted(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\nb\nc\n")
    config = load_config(CONFIGS[0], [f"data.source={tmp_path / 'prompts.txt'}", "data.num_images=null"])
    assert preparation_forwards(config) == 3 * 32 * 2
    assert "drawn by the teacher: 192 passes" in describe(config, stages=["prepare"])
    assert preparation_forwards(load_config(CONFIGS[0])) == 0
