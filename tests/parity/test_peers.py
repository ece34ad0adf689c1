"""The peers' objectives on Gaussian data, where scores, flows and fixed points have closed forms."""

import pytest
import torch
from diffusers import LCMScheduler

from eval.peers import dmd2, lcm
from stepdistill.diffusion.solver import implied_noise, move, rollout
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.objectives import adversarial
from stepdistill.objectives.distribution_matching import fake_score_loss
from stepdistill.objectives.mse import mse_loss
from tests.conftest import ends_of

MEAN, STD = 0.7, 0.4


@pytest.fixture(scope="module")
def noise_path():
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    return VariancePreserving.from_betas(betas)


def exact(noise_path, mean=MEAN, std=STD):
    """epsilon of x_t for data N(mean, std^2): sigma (x - alpha mean) / (alpha^2 std^2 + sigma^2)."""

    def output(sample, timesteps):
        alpha, sigma = noise_path.alpha_sigma(timesteps, ndim=sample.ndim, dtype=sample.dtype)
        return sigma * (sample - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return output


def ddim_map(noise_path, timesteps):
    """Slope and offset of the 50-node DDIM flow from each of `timesteps` down to timestep 0, step after step."""
    slope, offset = torch.ones(len(timesteps), dtype=torch.float64), torch.zeros(len(timesteps)).double()
    current = timesteps.clone()
    while bool((current > 0).any()):
        following = torch.where(current > 0, (current - 20).clamp(min=0), current)
        a, s = noise_path.alpha_sigma(current)
        a2, s2 = noise_path.alpha_sigma(following)
        gain = s / (a**2 * STD**2 + s**2)
        moved = torch.stack([torch.ones_like(a), torch.zeros_like(a)])
        epsilon = torch.stack([gain, -gain * a * MEAN])
        step = a2 / a * (moved - s * epsilon) + s2 * epsilon
        here = current > 0
        slope, offset = (
            torch.where(here, step[0] * slope, slope),
            torch.where(here, step[0] * offset + step[1], offset),
        )
        current = following
    return slope, offset


def test_boundary_scalings_equal_those_of_lcm_scheduler():
    scheduler = LCMScheduler()
    for t in (0, 1, 19, 499, 999):
        skip, out = lcm.boundary_scalings(torch.tensor([t]))
        assert (float(skip), float(out)) == pytest.approx(
            scheduler.get_scalings_for_boundary_condition_discrete(t), rel=1e-6, abs=1e-12
        )


def test_the_consistency_function_of_the_exact_flow_is_a_fixed_point(noise_path):
    """If f(x_t) is DDIM's map to timestep 0, the loss is 0; with the slope but without the offset, it is not."""
    timesteps = noise_path.nodes(lcm.NODES)
    sample = torch.linspace(-2, 2, len(timesteps), dtype=torch.float64)[:, None]

    def flow(shift):
        def output(x, t):
            slope, offset = ddim_map(noise_path, t)
            skip, out = lcm.boundary_scalings(t, ndim=2)
            alpha, sigma = noise_path.alpha_sigma(t, ndim=2)
            expected = slope[:, None] * x + shift * offset[:, None]
            original = torch.where(t[:, None] > 0, (expected - skip * x) / out.clamp(min=1e-9), x)
            return (x - alpha * original) / sigma

        return output

    losses = [
        float(
            lcm.consistency_loss(
                flow(shift),
                flow(shift),
                exact(noise_path),
                sample,
                timesteps,
                noise_path=noise_path,
                prediction_type="epsilon",
            )
        )
        for shift in (1.0, 0.0)
    ]
    assert losses[0] < 1e-9
    assert losses[1] > 1e-4


@pytest.mark.slow
def test_consistency_training_learns_the_flow(noise_path):
    """A table of affine maps, trained with the loss, converges to DDIM's map on the 50 nodes."""
    nodes = noise_path.nodes(lcm.NODES)
    row = torch.full((1001,), -1)
    row[nodes] = torch.arange(lcm.NODES)
    table = torch.zeros(lcm.NODES, 2, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([table], lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)

    def student(x, t):
        """The epsilon for x_0 = slope x + offset; at timestep 0 it does not matter, because f is x there."""
        weights = table[row[t].clamp(min=0)]
        original = weights[:, :1] * x + weights[:, 1:]
        alpha, sigma = noise_path.alpha_sigma(t, ndim=2)
        return (x - alpha * original) / sigma

    for _ in range(3000):
        x0 = MEAN + STD * torch.randn(200, 1, generator=generator, dtype=torch.float64)
        timesteps = nodes.repeat(4)
        noisy = noise_path.add_noise(
            x0, torch.randn(200, 1, generator=generator, dtype=torch.float64), timesteps
        )
        loss = lcm.consistency_loss(
            student,
            student,
            exact(noise_path),
            noisy,
            timesteps,
            noise_path=noise_path,
            prediction_type="epsilon",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    slope, offset = ddim_map(noise_path, nodes)
    a, s = noise_path.alpha_sigma(nodes)
    spread = (a**2 * STD**2 + s**2).sqrt()
    learned = table.detach()
    wrong = (learned[:, 0] - slope) * a * MEAN + learned[:, 1] - offset
    assert wrong.abs().max() < 0.03
    assert ((learned[:, 0] - slope) * spread).abs().max() < 0.03


def test_the_gradient_of_distribution_matching_is_the_difference_of_the_scores(noise_path):
    """For two Gaussians the gradient is g / n with both x_0 predictions in closed form."""
    original = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None].requires_grad_()
    timesteps = torch.tensor([30, 100, 300, 500, 700, 900])
    noise = torch.linspace(1, -1, 6, dtype=torch.float64)[:, None]

    def denoiser(mean, std):
        def to_original(x, t):
            a, s = noise_path.alpha_sigma(t, ndim=2)
            return (a * std**2 * x + s**2 * mean) / (a**2 * std**2 + s**2)

        return to_original

    real, fake = denoiser(MEAN, STD), denoiser(-0.3, 0.9)
    dmd2.distribution_matching_loss(original, real, fake, timesteps, noise, noise_path=noise_path).backward()
    x = original.detach()
    noisy = noise_path.add_noise(x, noise, timesteps)
    expected = (fake(noisy, timesteps) - real(noisy, timesteps)) / (x - real(noisy, timesteps)).abs() / 6
    assert torch.allclose(original.grad, expected, rtol=1e-9)


def test_dmd2_training_matches_the_data(noise_path):
    """An affine one-step generator, with the exact score of its output as fake score, learns the data's mean and spread."""
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    low, high = dmd2.SCORE_RANGE

    def denoiser(mean, std):
        def to_original(x, t):
            a, s = noise_path.alpha_sigma(t, ndim=2)
            return (a * std**2 * x + s**2 * mean) / (a**2 * std**2 + s**2)

        return to_original

    for _ in range(800):
        z = torch.randn(256, 1, generator=generator, dtype=torch.float64)
        original = weights[0] + weights[1] * z
        timesteps = torch.randint(low, high, (256,), generator=generator)
        noise = torch.randn(256, 1, generator=generator, dtype=torch.float64)
        mean, std = weights.detach()
        loss = dmd2.distribution_matching_loss(
            original, denoiser(MEAN, STD), denoiser(mean, std), timesteps, noise, noise_path=noise_path
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    mean, std = weights.detach().tolist()
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert abs(std) == pytest.approx(STD, abs=0.02)


def test_the_loss_of_the_fake_score_is_lowest_at_the_exact_score(noise_path):
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    timesteps = torch.randint(20, 980, (20_000,), generator=generator)
    noisy = noise_path.add_noise(x0, noise, timesteps)

    def loss(mean, std):
        output = exact(noise_path, mean, std)(noisy, timesteps)
        return float(
            fake_score_loss(output, noisy, noise, timesteps, noise_path=noise_path, prediction_type="epsilon")
        )

    best = loss(MEAN, STD)
    assert all(best < loss(m, s) for m, s in ((0.6, STD), (0.8, STD), (MEAN, 0.3), (MEAN, 0.5)))


def test_backward_simulation_with_the_exact_denoiser_of_one_point_gives_that_point_noised(noise_path):
    """If the denoiser always returns x_0, x at node k is alpha_k x_0 + sigma_k noise_k; at node 0 it is the noise."""
    nodes, generator = noise_path.nodes(4), torch.Generator().manual_seed(0)
    noises = torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)
    stops = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    point = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
    batch_sizes = []

    def denoise(rows, x, t):
        batch_sizes.append(len(rows))
        return point[rows]

    simulated = dmd2.backward_simulation(denoise, noises, nodes, stops, noise_path=noise_path)
    for k, stop in enumerate(stops.tolist()):
        a, s = noise_path.alpha_sigma(nodes[stop : stop + 1])
        expected = noises[0, k] if stop == 0 else a * point[k] + s * noises[stop, k]
        assert torch.allclose(simulated[k], expected)
    assert batch_sizes == [6, 4, 2]


def test_progressive_distillation_learns_the_two_steps_of_its_teacher(noise_path):
    """Affine students of Gaussian data reach the map of two DDIM moves exactly, from every node, in the x0 loss."""
    nodes, teacher = noise_path.nodes(8), exact(noise_path)
    ends = ends_of(noise_path, nodes, 8)
    path = noise_path.substeps(nodes.tolist(), ends.tolist(), 16)
    table = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        x0 = MEAN + STD * torch.randn(8, 32, generator=generator, dtype=torch.float64)
        x = noise_path.add_noise(x0, torch.randn(8, 32, generator=generator, dtype=torch.float64), nodes)
        target = rollout(
            lambda rows, state, t: teacher(state, t),
            x,
            path,
            noise_path=noise_path,
            prediction_type="epsilon",
        )
        moved = move(
            table[:, :1] * x + table[:, 1:], x, nodes, ends, noise_path=noise_path, prediction_type="epsilon"
        )
        loss = mse_loss(moved, target, nodes, ends, noise_path=noise_path, space="truncated_snr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    for x in (torch.full((8, 1), v, dtype=torch.float64) for v in (-1.0, 0.0, 2.0)):
        target = rollout(
            lambda rows, state, t: teacher(state, t),
            x,
            path,
            noise_path=noise_path,
            prediction_type="epsilon",
        )
        expected = implied_noise(x, target, nodes, ends, noise_path=noise_path)
        assert torch.allclose(table.detach()[:, :1] * x + table.detach()[:, 1:], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["non_saturating", pytest.param("relativistic", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_adversarial_loss_brings_mean_and_spread_to_those_of_the_real_samples(noise_path, kind):
    """The critic has logits a + b x + c x^2, which can tell two Gaussians apart; the student is affine."""
    student = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    critic = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    of_student = torch.optim.Adam([student], lr=0.004, betas=(0.0, 0.99))
    of_critic = torch.optim.Adam([critic], lr=0.04, betas=(0.0, 0.99), weight_decay=0.01)
    decay = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 3000) for o in (of_student, of_critic)]

    def logits(x, weights):
        return (weights[0] + weights[1] * x + weights[2] * x**2).unsqueeze(1)

    for _ in range(3000):
        real = MEAN + STD * torch.randn(512, generator=generator, dtype=torch.float64)
        fake = student[0] + student[1] * torch.randn(512, generator=generator, dtype=torch.float64)
        outputs = [logits(x, critic) for x in (real, fake.detach())]
        of_critic.zero_grad()
        adversarial.discriminator_loss(*outputs, kind=kind).backward()
        of_critic.step()
        fixed = critic.detach()
        of_student.zero_grad()
        adversarial.generator_loss(logits(fake, fixed), logits(real, fixed), kind=kind).backward()
        of_student.step()
        for schedule_of_rate in decay:
            schedule_of_rate.step()
    mean, std = student.detach().tolist()
    assert mean == pytest.approx(MEAN, abs=0.05)
    assert abs(std) == pytest.approx(STD, abs=0.06)
