"""The learning rate over a phase: warm-up, peak, decay."""

from pathlib import Path

import pytest
import torch

from stepdistill.config.load import load_config
from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.training.optim import RoleOptimizer

CONFIGS = sorted(Path("configs").glob("*.yaml"))


def rates(max_train_steps, *, lr_warmup_steps=10, learning_rate=1.0):
    optimizer = RoleOptimizer(
        TrainedWeights({"weight": torch.nn.Parameter(torch.zeros(1))}),
        learning_rate=learning_rate,
        adversarial=True,
        max_train_steps=max_train_steps,
        lr_warmup_steps=lr_warmup_steps,
        lr_final_fraction=0.1,
    )
    values = []
    for _ in range(max_train_steps):
        values.append(optimizer.learning_rate)
        optimizer.step()
    return values


@pytest.mark.parametrize("updates", [1, 5, 9, 10, 12, 15, 20, 80, 99])
def test_a_short_phase_reaches_its_learning_rate(updates):
    values = rates(updates)
    assert max(values) > 0.97
    assert values.index(max(values)) == updates // 10


def test_a_long_phase_has_the_warm_up_of_the_config():
    values = rates(250)
    assert values[:10] == pytest.approx([(k + 1) / 11 for k in range(10)], rel=0.01)
    assert values.index(max(values)) == 10
    assert values[-1] == pytest.approx(0.1, rel=0.01)
    assert rates(250, lr_warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_phase_reaches_its_learning_rate(path):
    config = load_config(path)
    for phase in (phase for rung in config.ladder for phase in rung.phases):
        values = rates(phase.max_train_steps, lr_warmup_steps=config.training.lr_warmup_steps)
        assert max(values) > 0.97
