"""What one update computes beside the roles' gradients: where x_t comes from, what is told, what D is asked."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.config import Phase
from stepdistill.diffusion.schedule import CLEAN, NoiseSchedule, jump, make_betas, trailing_timesteps
from stepdistill.training.steps import adversarial_step, mse_step, phase_step, student_move
from tests.unit.test_roles import BATCH, forward, make_batch, make_discriminator, make_nets


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


@pytest.mark.parametrize("count", [1000, 512])
def test_the_teacher_moves_as_ddim_does_on_a_schedule_of_any_length(count):
    """Two moves of a teacher of 8 steps within one of 4, against diffusers' sampler of so many training timesteps."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    nets = make_nets(NoiseSchedule.from_betas(make_betas(**betas, num_train_timesteps=count)))
    nets.roles.teacher_is_base = True
    nodes = trailing_timesteps(4, num_train_timesteps=count)[:BATCH]
    ends = jump(nodes, 4, num_train_timesteps=count)
    batch, known = dataclasses.replace(make_batch(), timesteps=nodes, prev_timesteps=ends), {}
    mse_step(nets, batch, teacher_steps=8, loss_space="prev_sample", known=known)
    scheduler = DDIMScheduler(
        **betas, num_train_timesteps=count, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(8)
    state = batch.noise[:1]
    with torch.no_grad():
        for t in scheduler.timesteps[:2]:
            told = batch.conditioning.rows(torch.tensor([0]))
            state = scheduler.step(forward(nets.roles.unet, state, t[None], told), t, state).prev_sample
    assert torch.allclose(known[0][:1], state, atol=1e-4)


def test_d_sees_clean_samples_at_timesteps_that_a_short_schedule_has():
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=500)
    nets = make_nets(NoiseSchedule.from_betas(betas))
    nodes = trailing_timesteps(4, num_train_timesteps=500)[1:]
    ends = jump(nodes, 4, num_train_timesteps=500)
    assert ends[-1] == CLEAN
    batch = dataclasses.replace(make_batch(), timesteps=nodes, prev_timesteps=ends)
    found = adversarial_step(
        nets, make_discriminator(nets), batch, teacher_steps=8, perturbation_weights=[0, 0, 0, 1]
    )
    assert all(loss.isfinite() for loss in found.losses.values())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_automatic_loss_space_is_what_the_student_predicts(schedule, kind):
    nets, batch = dataclasses.replace(make_nets(schedule), student_prediction_type=kind), make_batch()
    losses = [
        phase_step(nets, batch, Phase(objective="mse", loss_space=space), teacher_steps=8, discriminator=None)
        for space in ("auto", kind, "prev_sample")
    ]
    automatic, named, other = (loss.losses["student"] for loss in losses)
    assert torch.equal(automatic, named)
    assert automatic != other
