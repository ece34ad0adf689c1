"""Our noise schedules, timesteps and moves against diffusers' schedulers."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from stepdistill.diffusion.grid import trailing_nodes
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.solver import move
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from stepdistill.export.scheduler import student_scheduler
from tests.conftest import randn

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_are_diffusers(name, zero_snr):
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr, **BETAS).alphas_cumprod
    betas = make_betas(name, num_train_timesteps=1000, **BETAS)
    ours = VariancePreserving.from_betas(betas, zero_terminal_snr=zero_snr).alphas_cumprod
    assert torch.allclose(ours.float(), theirs, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32, 128])
def test_trailing_timesteps_are_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing", **BETAS)
    scheduler.set_timesteps(steps)
    assert trailing_nodes(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [8, 4, 2, 1])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_moves_equal_ddim(noise_path, steps, kind):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=kind,
        **BETAS,
    )
    scheduler.set_timesteps(steps)
    for t, s in itertools.pairwise([*trailing_nodes(steps), CLEAN]):
        sample, output = randn(2, 4, 8, 8, seed=t), randn(2, 4, 8, 8, seed=t + 1)
        theirs = scheduler.step(output, t, sample).prev_sample
        start, end = torch.full((2,), t), torch.full((2,), s)
        ours = move(output, sample, start, end, noise_path=noise_path, prediction_type=kind)
        assert torch.allclose(ours, theirs, rtol=2e-4, atol=2e-4), (t, s)


@pytest.mark.parametrize("steps", [32, 8, 4, 2, 1])
def test_moves_equal_euler_trailing(noise_path, steps):
    """Euler works in sigma space: its sample is ours divided by alpha_t, its derivative is epsilon."""
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing", **BETAS)
    scheduler.set_timesteps(steps)
    for t, s in itertools.pairwise([*trailing_nodes(steps), CLEAN]):
        sample, output = randn(2, 4, 8, 8, seed=t), randn(2, 4, 8, 8, seed=t + 1)
        start, end = torch.full((2,), t), torch.full((2,), s)
        alpha_t, _ = noise_path.alpha_sigma(start, ndim=4, dtype=torch.float32)
        alpha_s, _ = noise_path.alpha_sigma(end, ndim=4, dtype=torch.float32)
        theirs = scheduler.step(output, torch.tensor(float(t)), sample / alpha_t).prev_sample * alpha_s
        ours = move(output, sample, start, end, noise_path=noise_path, prediction_type="epsilon")
        assert torch.allclose(ours, theirs, rtol=2e-4, atol=2e-3 if s != CLEAN else 5e-3), (t, s)


def test_add_noise_is_diffusers(noise_path):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", **BETAS)
    clean, noise, t = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([999, 400, 0])
    assert torch.allclose(
        noise_path.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t), atol=1e-5
    )


@pytest.mark.parametrize("start", [249, 499, 999])
@pytest.mark.parametrize("name", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_one_step_with_an_earlier_conditioning_timestep_is_one_step_of_the_exported_scheduler(
    start, name, kind
):
    """The exported betas end at `start`, so DDIM takes pure noise for the sample at that timestep."""
    teacher = {"beta_schedule": name, "num_train_timesteps": 1000, **BETAS}
    exported = student_scheduler(teacher, kind, start_timestep=start)
    noise_path = VariancePreserving.from_betas(make_betas(name, num_train_timesteps=1000, **BETAS))
    noise, output = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    ends = torch.full((2,), start), torch.full((2,), CLEAN)
    ours = move(output, noise, *ends, noise_path=noise_path, prediction_type=kind)
    exported.set_timesteps(1)
    assert exported.timesteps.tolist() == [start]
    theirs = exported.step(output, start, noise * exported.init_noise_sigma).prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
