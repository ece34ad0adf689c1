"""What a run is said to cost, against what it does."""

import sys
from pathlib import Path

import pytest

from stepdistill.config_file import load_config
from stepdistill.diffusion.schedule import jump, substep_path, trailing_timesteps
from stepdistill.plan import phase_forwards, training_forwards

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import variants

CONFIGS = ("configs/letters.yaml", "configs/letters_lightning.yaml")


@pytest.mark.parametrize("path", CONFIGS)
def test_teacher_moves_are_counted_as_the_solver_takes_them(path):
    """The mean length of the teacher's paths over the nodes that a rung is trained at: twice the bare U-Net for the guided
    base, once with a LoRA for the student of another rung."""
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
            each = 2 if rung is config.ladder[0] else 1.083
            alone = {"mse": 1.083 + 1.268, "paired": 7.601, "single": 5.901}[phase.objective]
            assert phase_forwards(config, rung, phase) == pytest.approx(each * moves + alone, abs=1e-3)


def test_convert_asks_the_rung_before_which_has_a_lora():
    last = load_config(CONFIGS[1]).ladder[-1]
    found = phase_forwards(load_config(CONFIGS[1]), last, last.phases[0])
    assert found == pytest.approx(1.083 + 1.083 + 1.268)
    alone = load_config(
        CONFIGS[0], ["ladder.0.prediction_type=sample", "ladder.0.phases.0.objective=convert"]
    )
    base = phase_forwards(alone, alone.ladder[0], alone.ladder[0].phases[0])
    assert base == pytest.approx(1 + 1.083 + 1.268)


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
    assert saved == pytest.approx(0.5 * 4 * 1.083)
