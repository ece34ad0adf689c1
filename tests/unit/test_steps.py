"""What one update computes beside the roles' gradients: where x_t comes from, what is told, what D is asked."""

import dataclasses

import pytest
import torch

from stepdistill.diffusion.schedule import CLEAN
from stepdistill.training.steps import mse_step, student_move
from tests.unit.test_roles import BATCH, make_batch, make_nets


def test_pure_noise_is_told_the_start_timestep_and_nothing_else_is(schedule):
    """x_s = a_s x_0 + s_s e with x_0 = (z - s_499 e) / a_499, e of the U-Net at 499; other rows as ever."""
    plain = make_nets(schedule)
    nets, batch = dataclasses.replace(plain, start_timestep=499), make_batch()
    batch = dataclasses.replace(batch, prev_timesteps=torch.tensor([CLEAN, 249, CLEAN]))
    moved = student_move(nets, batch.noise, batch).detach()
    assert torch.equal(moved[1:], student_move(plain, batch.noise, batch).detach()[1:])
    with torch.no_grad(), nets.roles.student():
        epsilon = nets.roles.predict(batch.noise, torch.tensor([499] * BATCH), batch.conditioning)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([499]), ndim=4, dtype=torch.float32)
    assert torch.allclose(moved[:1], ((batch.noise - sigma * epsilon) / alpha)[:1], atol=1e-5)


def test_kept_teacher_samples_are_used_again(schedule, monkeypatch):
    nets, batch, known = make_nets(schedule), make_batch(), {}
    options = {"teacher_steps": 8, "loss_space": "prev_sample", "known": known}
    first = mse_step(nets, batch, number=7, **options).losses["student"]
    assert set(known) == {7}
    monkeypatch.setattr(nets.roles, "teacher", lambda: pytest.fail("the teacher was asked"))
    assert torch.equal(mse_step(nets, batch, number=7, **options).losses["student"], first)
