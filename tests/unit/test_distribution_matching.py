"""Distribution matching: closed forms of its losses, and which network computes what and gets gradients."""

import dataclasses

import pytest
import torch

from stepdistill.config import ConfigError, Phase
from stepdistill.config.load import load_config
from stepdistill.data.batches import Perturbation, draw_batch
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.models.scores import build_scores
from stepdistill.models.shared_network import FAKE_SCORE, STUDENT
from stepdistill.objectives.distribution_matching import (
    draw_score_timesteps,
    fake_score_loss,
    matching_loss,
)
from stepdistill.training.losses import learning_roles
from stepdistill.training.samples import Samples
from tests.conftest import make_conditioning, randn
from tests.unit.test_cache import cache, shard
from tests.unit.test_gradients import BATCH, fill, make_batch, make_pair

DMD = Phase(objective="dmd", max_train_steps=10)


def make_scores(pair, *, guidance_scale=3.0):
    undistilled = dataclasses.replace(
        pair.teacher, adapter=None, guidance_scale=guidance_scale, unconditional=make_conditioning(1, seed=9)
    )
    scores = build_scores(DMD, undistilled, rank=4, seed=5)
    fill(pair.network, FAKE_SCORE, 400)
    return scores


def scored(batch):
    """A batch whose rows the scores see at three timesteps."""
    return dataclasses.replace(
        batch, score=Perturbation(torch.tensor([20, 500, 979]), randn(BATCH, 4, 8, 8, seed=7))
    )


def test_the_gradient_is_the_difference_of_the_scores_over_the_error_of_the_real_one():
    """dL/dx = (x_fake - x_real) / mean |x - x_real| / number of elements (DMD, Eq 7-8), and none reaches the scores."""
    x, real, fake = (randn(3, 4, 8, 8, seed=s).requires_grad_() for s in (0, 1, 2))
    loss = matching_loss(x, real, fake)
    loss.backward()
    scale = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = ((fake - real) / scale).detach()
    assert torch.allclose(x.grad, expected / x.numel(), rtol=1e-5, atol=1e-9)
    assert torch.allclose(loss, expected.square().mean() / 2, rtol=1e-5)
    assert real.grad is None
    assert fake.grad is None


def test_equal_scores_give_no_gradient_and_an_exact_real_score_no_infinity():
    x = randn(2, 4, 8, 8).requires_grad_()
    matching_loss(x, randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=1)).backward()
    assert not x.grad.any()
    assert matching_loss(x, x.detach(), randn(2, 4, 8, 8, seed=1)).isfinite()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_fake_scores_loss_is_that_of_its_epsilon(noise_path, prediction_type):
    """An output that is exact gives 0; one whose epsilon is off by 1 everywhere gives 1, whatever it predicts."""
    original, noise, timesteps = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([20, 500, 979])
    alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=4, dtype=torch.float64)
    noisy = alpha * original + sigma * noise

    def loss(epsilon):
        x_0 = (noisy - sigma * epsilon) / alpha
        output = {"epsilon": epsilon, "sample": x_0, "v_prediction": alpha * epsilon - sigma * x_0}
        return fake_score_loss(
            output[prediction_type],
            noisy,
            noise,
            timesteps,
            noise_path=noise_path,
            prediction_type=prediction_type,
        ).item()

    assert loss(noise.double()) == pytest.approx(0.0, abs=1e-10)
    assert loss(noise.double() + 1) == pytest.approx(1.0, rel=1e-6)


def test_the_scores_see_timesteps_20_to_979():
    drawn = draw_score_timesteps(torch.linspace(0, 1, 9601)[:-1])
    assert drawn.min() == 20
    assert drawn.max() == 979
    assert torch.equal(drawn.unique(), torch.arange(20, 980))
    assert draw_score_timesteps(torch.tensor([1.0])).item() == 979


def test_each_role_gets_its_own_gradient_alone(noise_path):
    pair, batch = make_pair(noise_path), scored(make_batch(noise_path))
    losses = pair.losses(batch, DMD, scores=make_scores(pair))
    assert list(losses.by_role) == [FAKE_SCORE, STUDENT]
    fake_parameters = list(pair.network.group(FAKE_SCORE).values())
    losses.by_role[FAKE_SCORE].backward()
    assert all(p.grad is not None and p.grad.any() for p in fake_parameters)
    assert all(p.grad is None for p in pair.student_parameters)
    of_fake = [p.grad.clone() for p in fake_parameters]
    losses.by_role[STUDENT].backward()
    assert all(p.grad is not None and p.grad.any() for p in pair.student_parameters)
    assert all(torch.equal(p.grad, g) for p, g in zip(fake_parameters, of_fake, strict=True))


def test_the_losses_are_those_of_separate_passes(noise_path):
    """x_0 by the student, the real score by the guided base, the fake one by its adapter, both at the same x_tau."""
    pair, batch = make_pair(noise_path), scored(make_batch(noise_path))
    scores = make_scores(pair)
    losses = pair.losses(batch, DMD, scores=scores)
    with torch.no_grad():
        x_t = noise_path.add_noise(
            batch.original_samples, batch.noise, batch.timesteps, pure_noise_at_last=True
        )
        x_0 = pair.student.predict(x_t, batch.timesteps, batch.conditioning, target="sample")
        at, noise = batch.score.timesteps, batch.score.noise
        alpha, sigma = noise_path.alpha_sigma(at, ndim=4, dtype=torch.float32)
        x_tau = alpha * x_0 + sigma * noise
        unconditional = make_conditioning(1, seed=9).beside(batch.conditioning)
        with pair.network.using(None):
            without = pair.network.ask(x_tau, at, unconditional)
            real = without + 3.0 * (pair.network.ask(x_tau, at, batch.conditioning) - without)
        with pair.network.using(FAKE_SCORE):
            fake = pair.network.ask(x_tau, at, batch.conditioning)
        by_fake = (fake - noise).square().mean()
        by_student = matching_loss(x_0, (x_tau - sigma * real) / alpha, (x_tau - sigma * fake) / alpha)
    assert torch.allclose(losses.by_role[FAKE_SCORE], by_fake, rtol=1e-4)
    assert torch.allclose(losses.by_role[STUDENT], by_student, rtol=1e-3)


def test_an_update_costs_its_passes_and_no_more(noise_path, monkeypatch):
    """With mse and dmd, student and fake score run once; an update of the fake score alone needs no real score."""
    pair, batch = make_pair(noise_path), scored(make_batch(noise_path))
    scores, passes, ask = make_scores(pair), [], pair.network.ask

    def spied(*args):
        passes.append((pair.network.state.adapter, torch.is_grad_enabled()))
        return ask(*args)

    monkeypatch.setattr(pair.network, "ask", spied)
    pair.losses(batch, Phase(objectives=({"kind": "dmd"}, {"kind": "mse"})), scores=scores)
    teacher = [("teacher", False)] * len(batch.teacher_moves)
    assert passes == [(STUDENT, True), (FAKE_SCORE, True), (None, False), *teacher]
    passes.clear()
    still = pair._replace(student=dataclasses.replace(pair.student, trains=False))
    samples = Samples(batch, student=still.student, teacher=pair.teacher, scores=scores)
    assert samples.fake_output.requires_grad
    assert passes == [(STUDENT, False), (FAKE_SCORE, True)]


def test_the_student_learns_in_the_last_of_its_critics_updates():
    assert DMD.updates_per_student_update == 5
    assert DMD.student_updates == 2
    roles = [learning_roles(DMD, step) for step in range(10)]
    assert roles == [*[(FAKE_SCORE,)] * 4, (FAKE_SCORE, STUDENT)] * 2
    both = Phase(objectives=({"kind": "dmd"}, {"kind": "single"}), critic_updates=1)
    assert learning_roles(both, 0) == (FAKE_SCORE, "discriminator", STUDENT)
    assert learning_roles(Phase(objective="mse"), 0) == (STUDENT,)


@pytest.mark.parametrize("start_timestep", [None, 499])
def test_own_inputs_are_where_the_students_sampler_comes_to(noise_path, tmp_path, start_timestep):
    """x_t at node k is the noise moved by the student's first k steps, row by row; gradients begin at x_t."""
    pair = make_pair(noise_path)
    student = dataclasses.replace(pair.student, start_timestep=start_timestep)
    batch = draw_batch(
        cache([shard(tmp_path / "shard", list(range(16)), size=(64, 64))]),
        list(range(16)),
        noise_path=noise_path,
        student_steps=4,
        node_steps=4,
        from_own=True,
        seed=0,
        keys=("own",),
        dtype=torch.float32,
    )
    batch = dataclasses.replace(batch, conditioning=make_conditioning(16))
    assert set(batch.timesteps.tolist()) == {999, 749, 499, 249}
    samples = Samples(batch, student=student, teacher=pair.teacher)
    assert not samples.noisy.requires_grad
    assert samples.student_sample.requires_grad
    for row, node in enumerate(batch.timesteps.tolist()):
        x, one = batch.noise[row : row + 1], torch.ones(1, dtype=torch.int64)
        conditioning = batch.conditioning.rows(torch.tensor([row]))
        for start, end in zip((999, 749, 499, 249), (749, 499, 249, CLEAN), strict=True):
            if start == node:
                break
            with torch.no_grad():
                x = student.move(x, start * one, end * one, conditioning)
        assert torch.allclose(samples.noisy[row : row + 1], x, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["ladder.1.phases.0.critic_updates=5"],
            r"critic_updates: got 5, but mse has neither discriminator nor fake score; allowed: 1",
        ),
        (
            ["ladder.1.phases.0.objective=dmd", "ladder.1.phases.0.max_train_steps=4"],
            r"max_train_steps: got 4, in which the student would not learn; allowed: at least 5",
        ),
        (
            ["ladder.1.phases.0.inputs=own", "ladder.1.node_steps=16"],
            r"inputs: got own on a rung with node_steps 16; allowed: data",
        ),
        (
            ["ladder.1.phases.0.inputs=own", "ladder.1.phases.0.cached_updates=5"],
            r"inputs: got own with cached_updates, which needs inputs that stay as they are; allowed: data",
        ),
        (
            ["ladder.1.phases.0.inputs=own", "ladder.1.phases.0.objective=denoise"],
            r"inputs: got own with denoise, whose data do not belong to the student's own x_t; allowed: data",
        ),
        (
            ["ladder.1.phases.1.inputs=own", "ladder.1.phases.1.objective=paired"],
            r"inputs: got own with paired and discriminator.real: data",
        ),
        (
            ["ladder.4.phases.0.objective=output"],
            r"ladder.4.phases.0.objectives: got output on a rung with start_timestep 499",
        ),
        (["ladder.1.phases.0.inputs=noise"], r"inputs: got 'noise'.*data.*own"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, text):
    with pytest.raises(ConfigError, match=text):
        load_config("configs/letters.yaml", overrides)
