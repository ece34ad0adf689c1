"""What a run is said to cost, against what it does."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from stepdistill.config_file import load_config
from stepdistill.diffusion.schedule import jump, substep_path, trailing_timesteps
from stepdistill.models.folder import embedded_folder
from stepdistill.plan import phase_forwards, training_forwards

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import variants

CONFIGS = ("configs/letters.yaml", "configs/letters_lightning.yaml")


@pytest.mark.parametrize("path", CONFIGS)
def test_teacher_moves_are_counted_as_the_solver_takes_them(path):
    """The mean length of the teacher's paths over the nodes that a rung is trained at."""
    config = load_config(path)
    for rung in config.ladder:
        for phase in rung.phases:
            if phase.objective == "convert" or phase.discriminator.real == "data":
                continue
            nodes = trailing_timesteps(rung.node_steps or rung.student_steps)
            route = substep_path(
                nodes, jump(nodes, rung.student_steps), phase.teacher_steps or rung.teacher_steps
            )
            moves = (route[:, 1:] != route[:, :-1]).double().sum(dim=1).mean().item()
            guided = 2 if rung is config.ladder[0] else 1
            alone = {"mse": 1.083 + 1.268, "paired": 7.601, "single": 5.901}[phase.objective]
            assert phase_forwards(config, rung, phase) == pytest.approx(guided * moves + alone, abs=1e-3)


def test_teacher_moves_are_counted_on_the_teachers_own_schedule(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(embedded_folder("teacher"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 45}))
    phases = "phases: [{objective: mse}]"
    ladder = f"ladder=[{{teacher_steps: 40, student_steps: 8, node_steps: 32, {phases}}}]"
    options = [ladder, "evaluation.teacher_steps=[8]", f"teacher.path={folder}"]
    config = load_config(CONFIGS[0], options)
    nodes = trailing_timesteps(32, num_train_timesteps=45)
    route = substep_path(nodes, jump(nodes, 8, num_train_timesteps=45), 40, num_train_timesteps=45)
    moves = (route[:, 1:] != route[:, :-1]).double().sum(dim=1).mean().item()
    (rung,) = config.ladder
    assert phase_forwards(config, rung, rung.phases[0]) == pytest.approx(2 * moves + 2.351, abs=1e-3)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_of_the_ablations_is_a_ladder_of_equal_forwards(name):
    config = load_config(CONFIGS[0])
    budget = training_forwards(config)
    changed = variants.variant(name).config(config, budget, 1.0)
    assert training_forwards(changed) == pytest.approx(budget, rel=0.01)
    assert (changed.model_copy(update={"name": config.name}) == config) == (name == "default")


def test_half_of_the_targets_kept_costs_half_of_the_teacher():
    config = load_config(CONFIGS[0])
    rung = config.ladder[1]
    phase = rung.phases[0]
    kept = phase.model_copy(update={"cached_updates": phase.max_train_steps // 2})
    saved = phase_forwards(config, rung, phase) - phase_forwards(config, rung, kept)
    assert saved == pytest.approx(0.5 * 4)
