"""Gaussian data N(mean, std^2): the denoiser is known in closed form, and so is the probability flow.

E[x0 | x_t] = mean + a std^2 (x_t - a mean) / (a^2 std^2 + s^2), and the flow maps x_t, standardised by its own marginal,
to the same standardised value at every other time.
"""

import contextlib

import pytest
import torch

from stepdistill.data.batches import Batch
from stepdistill.diffusion.prediction import convert
from stepdistill.diffusion.schedule import (
    CLEAN,
    NoiseSchedule,
    jump,
    make_betas,
    substep_path,
    trailing_timesteps,
)
from stepdistill.diffusion.solver import move, rollout
from stepdistill.models.conditioning import Conditioning
from stepdistill.objectives.mse import mse_loss
from stepdistill.training.steps import Denoisers, mse_step, noisy_latents, teacher_rollout
from tests.conftest import randn

MEAN, STD = 0.7, 0.4


def predictor(schedule, kind):
    def predict(rows, sample, timesteps):
        alpha, sigma = schedule.alpha_sigma(timesteps, ndim=2)
        original = MEAN + alpha * STD**2 * (sample - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return convert(original, sample, timesteps, schedule=schedule, prediction_type="sample", target=kind)

    return predict


def exact_flow(schedule, sample, start, end):
    (a, s), (b, r) = (schedule.alpha_sigma(torch.tensor([t]), ndim=2) for t in (start, end))
    before, after = ((x**2 * STD**2 + y**2).sqrt() for x, y in ((a, s), (b, r)))
    return b * MEAN + after * (sample - a * MEAN) / before


def whole_path(steps, batch):
    return torch.tensor([*trailing_timesteps(steps).tolist(), CLEAN]).expand(batch, -1)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_rollouts_converge_to_the_exact_flow_at_first_order(schedule, kind):
    sample = randn(64, 1, dtype=torch.float64)
    wanted = exact_flow(schedule, sample, 999, CLEAN)
    errors = []
    for steps in (8, 32, 128, 1000):
        found = rollout(
            predictor(schedule, kind), sample, whole_path(steps, 64), schedule=schedule, prediction_type=kind
        )
        errors.append((found - wanted).abs().max().item())
    assert errors[3] < 0.01
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def test_predictions_of_three_kinds_give_one_rollout(schedule):
    sample = randn(16, 1, dtype=torch.float64)
    found = [
        rollout(predictor(schedule, k), sample, whole_path(8, 16), schedule=schedule, prediction_type=k)
        for k in ("epsilon", "sample", "v_prediction")
    ]
    assert torch.allclose(found[0], found[1], atol=1e-10)
    assert torch.allclose(found[0], found[2], atol=1e-10)


def test_a_student_equal_to_its_teacher_has_loss_zero(schedule):
    """The student whose epsilon is the teacher's whole segment in one move: the loss is 0 in every space."""
    timesteps = trailing_timesteps(4)
    ends = jump(timesteps, 4)
    sample = randn(4, 1, dtype=torch.float64)
    target = rollout(
        predictor(schedule, "epsilon"),
        sample,
        substep_path(timesteps, ends, 8),
        schedule=schedule,
        prediction_type="epsilon",
    )
    one_step = predictor(schedule, "epsilon")(None, sample, timesteps)
    other = move(one_step, sample, timesteps, ends, schedule=schedule, prediction_type="epsilon")
    for space in ("prev_sample", "epsilon", "sample", "v_prediction"):
        assert mse_loss(target, target, timesteps, ends, schedule=schedule, space=space).item() == 0.0
        assert mse_loss(other, target, timesteps, ends, schedule=schedule, space=space).item() > 1e-6


def test_rows_that_arrived_are_not_evaluated(schedule):
    timesteps = torch.tensor([999, 249])
    path = substep_path(timesteps, jump(timesteps, 2), 4)
    asked = []

    def predict(rows, sample, times):
        asked.append(rows.tolist())
        return predictor(schedule, "epsilon")(rows, sample, times)

    sample = randn(2, 1, dtype=torch.float64)
    found = rollout(predict, sample, path, schedule=schedule, prediction_type="epsilon")
    assert asked == [[0, 1], [0]]
    alone = rollout(
        predictor(schedule, "epsilon"), sample[1:], path[1:, :2], schedule=schedule, prediction_type="epsilon"
    )
    assert torch.equal(found[1:], alone)


class GaussianRoles:
    """Teacher and student as closed forms: the conditioning is the mean, the student's spread is its own."""

    def __init__(self, schedule, kind):
        self.schedule, self.kind, self.std = schedule, kind, STD

    @contextlib.contextmanager
    def playing(self, std):
        before, self.std = self.std, std
        yield
        self.std = before

    def teacher(self):
        return self.playing(STD)

    def student(self):
        return self.playing(0.6)

    def predict(self, sample, timesteps, conditioning):
        mean = conditioning.encoder_hidden_states[:, 0, :1, None, None].to(sample.dtype)
        alpha, sigma = self.schedule.alpha_sigma(timesteps, ndim=4, dtype=sample.dtype)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        original = mean + gain * (sample - alpha * mean)
        kinds = {"prediction_type": "sample", "target": self.kind}
        return convert(original, sample, timesteps, schedule=self.schedule, **kinds)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("loss_space", ["prev_sample", "sample", "truncated_snr"])
def test_teachers_of_three_kinds_that_describe_one_gaussian_teach_the_same(zero_snr, loss_space):
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    schedule = NoiseSchedule.from_betas(betas, zero_terminal_snr=zero_snr)
    timesteps = torch.tensor([999, 749, 499, 249])
    batch = Batch(
        original_samples=randn(4, 4, 2, 2, seed=1, dtype=torch.float64),
        noise=randn(4, 4, 2, 2, seed=2, dtype=torch.float64),
        timesteps=timesteps,
        prev_timesteps=jump(timesteps, 4),
        conditioning=Conditioning(torch.full((4, 1, 1), MEAN, dtype=torch.float64)),
        perturbation_uniform=torch.zeros(4, dtype=torch.float64),
        perturbation_noise=randn(4, 4, 2, 2, seed=3, dtype=torch.float64),
    )
    losses, targets = [], []
    for kind in ("sample", "v_prediction") + (() if zero_snr else ("epsilon",)):
        empty = Conditioning(torch.full((1, 1, 1), -0.2, dtype=torch.float64))
        nets = Denoisers(GaussianRoles(schedule, kind), schedule, empty, kind, kind, guidance_scale=3.0)
        path = substep_path(batch.timesteps, batch.prev_timesteps, 16)
        targets.append(teacher_rollout(nets, noisy_latents(nets, batch), path, batch.conditioning))
        losses.append(mse_step(nets, batch, teacher_steps=16, loss_space=loss_space).losses["student"])
    assert all(bool(t.isfinite().all()) for t in targets)
    assert all(torch.allclose(t, targets[0], atol=1e-9) for t in targets)
    assert all(float(loss) == pytest.approx(float(losses[0]), rel=1e-9) and loss > 1e-3 for loss in losses)
