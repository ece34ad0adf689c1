"""What one update computes beside the roles' gradients: where x_t comes from, what is told, what D is asked."""

import dataclasses

import pytest
import torch

from stepdistill.diffusion.schedule import CLEAN
from stepdistill.training.steps import adversarial_step, mse_step, own_rollout, student_move
from tests.unit.test_roles import BATCH, make_batch, make_discriminator, make_nets

PLAIN = {"teacher_steps": 8, "perturbation_weights": [1.0, 1.0, 1.0, 1.0]}


def rows(batch, k):
    """One row of a batch as a batch."""
    parts = {
        f.name: getattr(batch, f.name)[k : k + 1]
        for f in dataclasses.fields(batch)
        if f.name != "conditioning"
    }
    return dataclasses.replace(batch, conditioning=batch.conditioning.rows(torch.tensor([k])), **parts)


def test_the_students_own_roll_out_takes_its_moves_one_by_one(schedule):
    """At 4 steps down to 999, 499 and 249 of three rows; a row alone gives the same."""
    nets, batch = make_nets(schedule), make_batch()
    found = own_rollout(nets, batch, student_steps=4)
    for k, path in enumerate([[], [999, 749], [999, 749, 499]]):
        state = batch.noise[k : k + 1]
        for t, s in zip(path, [*path[1:], int(batch.timesteps[k])], strict=False):
            one = dataclasses.replace(
                rows(batch, k), timesteps=torch.tensor([t]), prev_timesteps=torch.tensor([s])
            )
            state = student_move(nets, state, one).detach()
        assert torch.allclose(found[k : k + 1], state, atol=1e-5), k
        assert torch.allclose(own_rollout(nets, rows(batch, k), student_steps=4), state, atol=1e-5), k


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


def test_the_approximate_r1_adds_to_ds_loss_alone_and_does_not_depend_on_the_split(schedule):
    nets, batch = make_nets(schedule), make_batch()
    discriminator = make_discriminator(nets, paired=False)
    plain = adversarial_step(nets, discriminator, batch, **PLAIN)
    with_r1 = adversarial_step(nets, discriminator, batch, r1_weight=100.0, **PLAIN)
    assert torch.equal(with_r1.losses["student"], plain.losses["student"])
    added = with_r1.losses["discriminator"] - plain.losses["discriminator"]
    assert added > 1e-6
    parts = [
        adversarial_step(nets, discriminator, rows(batch, k), r1_weight=100.0, **PLAIN) for k in range(BATCH)
    ]
    split = sum(part.losses["discriminator"] for part in parts) / BATCH
    assert torch.allclose(split, with_r1.losses["discriminator"], rtol=1e-4)
