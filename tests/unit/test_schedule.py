import itertools

import pytest
import torch

from stepdistill.diffusion.schedule import (
    CLEAN,
    NoiseSchedule,
    jump,
    make_betas,
    substep_path,
    timestep_pairs,
    trailing_timesteps,
)
from tests.conftest import randn

LADDER = (128, 32, 8, 4, 2, 1)


@pytest.mark.parametrize(("fine", "coarse"), list(itertools.pairwise(LADDER)))
def test_grids_nest_with_equal_substeps(fine, coarse):
    k = fine // coarse
    assert trailing_timesteps(fine)[::k].tolist() == trailing_timesteps(coarse).tolist()


def test_few_step_nodes_are_the_published_ones():
    assert trailing_timesteps(1).tolist() == [999]
    assert trailing_timesteps(2).tolist() == [999, 499]
    assert trailing_timesteps(4).tolist() == [999, 749, 499, 249]
    assert trailing_timesteps(8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert timestep_pairs(2) == [(999, 499), (499, CLEAN)]


@pytest.mark.parametrize(("fine", "coarse"), [(128, 32), (32, 8), (8, 4), (4, 2), (2, 1), (8, 2), (4, 1)])
def test_substeps_from_every_student_node_land_on_the_next_one(fine, coarse):
    nodes = trailing_timesteps(coarse)
    following = jump(nodes, coarse)
    path = substep_path(nodes, following, fine)
    assert path.shape == (coarse, fine // coarse + 1)
    assert path[:, 0].tolist() == nodes.tolist()
    assert path[:, -1].tolist() == [*nodes[1:].tolist(), CLEAN]
    assert bool((path[:, 1:] < path[:, :-1]).all())


@pytest.mark.parametrize("count", [10, 77, 500, 4000])
@pytest.mark.parametrize(("fine", "coarse"), [(8, 8), (8, 4), (4, 2), (2, 1)])
def test_a_schedule_of_any_length_has_the_same_substeps(count, fine, coarse):
    nodes = trailing_timesteps(coarse, num_train_timesteps=count)
    path = substep_path(
        nodes, jump(nodes, coarse, num_train_timesteps=count), fine, num_train_timesteps=count
    )
    assert path.shape == (coarse, fine // coarse + 1)
    assert bool((path[:, 1:] < path[:, :-1]).all())


def test_jump_from_nodes_between_the_students_own_is_clamped_at_clean():
    """Section 2 of the recipe: t in {250, 500, 750, 1000}, jump 500, clamped at 0."""
    nodes = torch.tensor([999, 749, 499, 249])
    assert jump(nodes, 2).tolist() == [499, 249, CLEAN, CLEAN]
    assert jump(nodes, 1).tolist() == [CLEAN] * 4
    path = substep_path(nodes, jump(nodes, 2), 4)
    assert path.tolist() == [[999, 749, 499], [749, 499, 249], [499, 249, -1], [249, -1, -1]]


def test_a_path_that_goes_up_is_refused():
    with pytest.raises(ValueError, match="noisy to clean"):
        substep_path(torch.tensor([499]), torch.tensor([749]), 4)


def test_alpha_and_sigma_are_a_unit_vector_and_clean_is_exact(schedule):
    timesteps = torch.tensor([999, 500, 0, CLEAN])
    alpha, sigma = schedule.alpha_sigma(timesteps)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64), atol=1e-15)
    assert (alpha[-1].item(), sigma[-1].item()) == (1.0, 0.0)
    assert alpha.dtype == torch.float64


def test_add_noise_is_pure_noise_at_the_last_timestep_alone(schedule):
    clean, noise = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    timesteps = torch.tensor([999, 998, CLEAN])
    noisy = schedule.add_noise(clean, noise, timesteps, pure_noise_at_last=True)
    plain = schedule.add_noise(clean, noise, timesteps)
    assert torch.equal(noisy[0], noise[0])
    assert torch.equal(noisy[1:], plain[1:])
    assert not torch.equal(plain[0], noise[0])
    assert torch.equal(noisy[2], clean[2])


def test_schedules_do_not_depend_on_the_models_dtype(schedule):
    sample = randn(1, 1, 1, 1).to(torch.bfloat16)
    alpha, _ = schedule.alpha_sigma(torch.tensor([999]), dtype=torch.float32)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert abs(alpha.item() - schedule.alphas_cumprod[999].sqrt().item()) < 1e-8
    assert schedule.add_noise(sample, sample, torch.tensor([3])).dtype == torch.bfloat16


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(ValueError, match="scaled_linear"):
        make_betas("cosine", beta_start=0.1, beta_end=0.2, num_train_timesteps=10)
    with pytest.raises(ValueError, match="1 to 1000"):
        trailing_timesteps(0)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    plain, rescaled = (NoiseSchedule.from_betas(betas, zero_terminal_snr=z) for z in (False, True))
    assert rescaled.alphas_cumprod[-1].item() == 0.0
    assert abs(rescaled.alphas_cumprod[0].item() - plain.alphas_cumprod[0].item()) < 1e-15
