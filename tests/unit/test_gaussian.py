"""Gaussian data N(mean, std^2), for which the denoiser and the probability flow have closed forms.

E[x0 | x_t] = mean + a std^2 (x_t - a mean) / (a^2 std^2 + s^2), and the flow maps x_t, standardised by its own marginal,
to the same standardised value at every other time.
"""

import pytest
import torch

from stepdistill.config import Phase
from stepdistill.data.batches import Batch
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.prediction import convert_prediction
from stepdistill.diffusion.solver import move, rollout
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.network import kind as network_kind
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import SharedNetwork
from stepdistill.objectives.mse import mse_loss
from stepdistill.training.samples import Samples
from tests.conftest import ends_of, randn
from tests.unit.test_gradients import losses_of

MEAN, STD = 0.7, 0.4


def predictor(noise_path, kind):
    def predict(rows, sample, timesteps):
        alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=2)
        original = MEAN + alpha * STD**2 * (sample - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return convert_prediction(
            original, sample, timesteps, noise_path=noise_path, prediction_type="sample", target=kind
        )

    return predict


def exact_flow(noise_path, sample, start, end):
    (a, s), (b, r) = (noise_path.alpha_sigma(torch.tensor([t]), ndim=2) for t in (start, end))
    before, after = ((x**2 * STD**2 + y**2).sqrt() for x, y in ((a, s), (b, r)))
    return b * MEAN + after * (sample - a * MEAN) / before


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_rollouts_converge_to_the_exact_flow_at_first_order(noise_path, kind):
    sample = randn(64, 1, dtype=torch.float64)
    expected = exact_flow(noise_path, sample, 999, CLEAN)
    errors = []
    for steps in (8, 32, 128, 1000):
        result = rollout(
            predictor(noise_path, kind),
            sample,
            noise_path.sampling(steps, 64),
            noise_path=noise_path,
            prediction_type=kind,
        )
        errors.append((result - expected).abs().max().item())
    assert errors[3] < 0.01
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def test_all_three_prediction_types_give_the_same_rollout(noise_path):
    sample = randn(16, 1, dtype=torch.float64)
    rollouts = [
        rollout(
            predictor(noise_path, k),
            sample,
            noise_path.sampling(8, 16),
            noise_path=noise_path,
            prediction_type=k,
        )
        for k in ("epsilon", "sample", "v_prediction")
    ]
    assert torch.allclose(rollouts[0], rollouts[1], atol=1e-10)
    assert torch.allclose(rollouts[0], rollouts[2], atol=1e-10)


def test_a_student_equal_to_its_teacher_has_loss_zero(noise_path):
    """If the student's epsilon makes the teacher's whole segment in one move, the loss is 0 in every space."""
    timesteps = noise_path.nodes(4)
    ends = ends_of(noise_path, timesteps, 4)
    sample = randn(4, 1, dtype=torch.float64)
    target = rollout(
        predictor(noise_path, "epsilon"),
        sample,
        noise_path.substeps(timesteps.tolist(), ends.tolist(), 8),
        noise_path=noise_path,
        prediction_type="epsilon",
    )
    one_step = predictor(noise_path, "epsilon")(None, sample, timesteps)
    other = move(one_step, sample, timesteps, ends, noise_path=noise_path, prediction_type="epsilon")
    for space in ("prev_sample", "epsilon", "sample", "v_prediction"):
        assert mse_loss(target, target, timesteps, ends, noise_path=noise_path, space=space).item() == 0.0
        assert mse_loss(other, target, timesteps, ends, noise_path=noise_path, space=space).item() > 1e-6


def test_rows_that_have_arrived_are_not_evaluated(noise_path):
    timesteps = [999, 249]
    moves = noise_path.substeps(timesteps, noise_path.jump(timesteps, 2), 4)
    calls = []

    def predict(rows, sample, times):
        calls.append((None if rows is None else rows.tolist(), len(sample)))
        return predictor(noise_path, "epsilon")(rows, sample, times)

    sample = randn(2, 1, dtype=torch.float64)
    options = {"noise_path": noise_path, "prediction_type": "epsilon"}
    together = rollout(predict, sample, moves, **options)
    assert calls == [(None, 2), ([0], 1)]
    alone = rollout(
        predictor(noise_path, "epsilon"), sample[1:], noise_path.substeps([249], [CLEAN], 4), **options
    )
    assert torch.equal(together[1:], alone)


class GaussianNetwork(torch.nn.Module):
    """The exact denoiser of Gaussian data with spread `std` and the conditioning as mean; `kind` is its prediction type."""

    def __init__(self, noise_path, kind, std):
        super().__init__()
        self.noise_path, self.kind, self.std = noise_path, kind, std
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def forward(self, sample, timesteps, conditioning):
        mean = conditioning.encoder_hidden_states[:, 0, :1, None, None].to(sample.dtype)
        alpha, sigma = self.noise_path.alpha_sigma(timesteps, ndim=4, dtype=sample.dtype)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        original = mean + gain * (sample - alpha * mean)
        kinds = {"prediction_type": "sample", "target": self.kind}
        return convert_prediction(original, sample, timesteps, noise_path=self.noise_path, **kinds)


class GaussianKind:
    """The interface of GaussianNetwork: a new kind of network needs such a class and one line in KINDS."""

    network_class = GaussianNetwork

    def ask(self, network, sample, timesteps, conditioning):
        return network(sample, timesteps, conditioning)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("loss_space", ["prev_sample", "sample", "truncated_snr"])
def test_teachers_of_three_prediction_types_for_one_gaussian_give_the_same_loss(
    zero_snr, loss_space, monkeypatch
):
    monkeypatch.setattr(network_kind, "KINDS", [*network_kind.KINDS, GaussianKind()])
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    noise_path = VariancePreserving.from_betas(betas, zero_terminal_snr=zero_snr)
    nodes = [999, 749, 499, 249]
    ends = noise_path.jump(nodes, 4)
    batch = Batch(
        original_samples=randn(4, 4, 2, 2, seed=1, dtype=torch.float64),
        noise=randn(4, 4, 2, 2, seed=2, dtype=torch.float64),
        timesteps=torch.tensor(nodes),
        prev_timesteps=torch.tensor(ends),
        conditioning=Conditioning(torch.full((4, 1, 1), MEAN, dtype=torch.float64)),
        teacher_moves=noise_path.substeps(nodes, ends, 16),
    )
    empty = Conditioning(torch.full((1, 1, 1), -0.2, dtype=torch.float64))
    losses, targets = [], []
    for kind in ("sample", "v_prediction") + (() if zero_snr else ("epsilon",)):
        teacher, student = (
            Denoiser(SharedNetwork(GaussianNetwork(noise_path, kind, std)), None, noise_path, kind, **options)
            for std, options in (
                (STD, {"guidance_scale": 3.0, "unconditional": empty}),
                (0.6, {"trains": True}),
            )
        )
        samples = Samples(batch, student=student, teacher=teacher)
        targets.append(samples.teacher_sample)
        phase = Phase(objective="mse", loss_space=loss_space)
        losses.append(losses_of(samples, phase).by_role["student"])
    assert all(bool(t.isfinite().all()) for t in targets)
    assert all(torch.allclose(t, targets[0], atol=1e-9) for t in targets)
    assert all(float(loss) == pytest.approx(float(losses[0]), rel=1e-9) and loss > 1e-3 for loss in losses)


def test_a_network_of_an_unsupported_class_is_refused():
    with pytest.raises(ValueError, match="got Linear; allowed: UNet2DConditionModel"):
        SharedNetwork(torch.nn.Linear(1, 1))
