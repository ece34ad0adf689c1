"""Timestep grids, moves and noise schedules."""

import itertools

import pytest
import torch

from stepdistill.diffusion import grid
from stepdistill.diffusion.grid import trailing_nodes
from stepdistill.diffusion.noise_path import CLEAN
from stepdistill.diffusion.variance_preserving import VariancePreserving, make_betas
from tests.conftest import randn

LADDER = (128, 32, 8, 4, 2, 1)


@pytest.mark.parametrize(("fine", "coarse"), list(itertools.pairwise(LADDER)))
def test_grids_nest_with_equal_substeps(fine, coarse):
    assert trailing_nodes(fine)[:: fine // coarse] == trailing_nodes(coarse)


def test_few_step_nodes_are_the_published_ones(noise_path):
    assert trailing_nodes(1) == [999]
    assert trailing_nodes(2) == [999, 499]
    assert trailing_nodes(4) == [999, 749, 499, 249]
    assert trailing_nodes(8) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert noise_path.nodes(8).tolist() == trailing_nodes(8)
    assert noise_path.nodes(8).dtype == torch.int64


@pytest.mark.parametrize("count", [10, 77, 500, 1000, 4000])
@pytest.mark.parametrize(
    ("fine", "coarse"), [(128, 32), (32, 8), (8, 8), (8, 4), (4, 2), (2, 1), (8, 2), (4, 1)]
)
def test_substeps_from_every_student_node_land_on_the_next_one(count, fine, coarse):
    if fine > count:
        return
    options = {"num_train_timesteps": count}
    for start, end in itertools.pairwise([*trailing_nodes(coarse, **options), CLEAN]):
        assert grid.next_node(start, coarse, **options) == end
        route = grid.substeps(start, end, fine, **options)
        assert (route[0], route[-1], len(route)) == (start, end, fine // coarse + 1)
        assert route == sorted(route, reverse=True)


def test_a_jump_from_between_two_student_nodes_ends_at_clean_at_the_latest():
    """For t in {250, 500, 750, 1000} and a jump of 500, the end is clamped at 0."""
    nodes = [999, 749, 499, 249]
    assert [grid.next_node(t, 2) for t in nodes] == [499, 249, CLEAN, CLEAN]
    assert [grid.next_node(t, 1) for t in nodes] == [CLEAN] * 4
    routes = [grid.substeps(t, grid.next_node(t, 2), 4) for t in nodes]
    assert routes == [[999, 749, 499], [749, 499, 249], [499, 249, CLEAN], [249, CLEAN]]


def test_moves_contain_only_rows_that_have_not_arrived(noise_path):
    nodes = [999, 749, 499, 249]
    first, second = noise_path.substeps(nodes, noise_path.jump(nodes, 2), 4)
    assert first.rows is None
    assert (first.timesteps.tolist(), first.prev_timesteps.tolist()) == (nodes, [749, 499, 249, CLEAN])
    assert second.rows.tolist() == [0, 1, 2]
    assert (second.timesteps.tolist(), second.prev_timesteps.tolist()) == ([749, 499, 249], [499, 249, CLEAN])


def test_a_whole_sampling_visits_every_node_of_the_grid(noise_path):
    moves = noise_path.sampling(4, 2)
    assert [move.timesteps.tolist() for move in moves] == [[node] * 2 for node in trailing_nodes(4)]
    assert moves[-1].prev_timesteps.tolist() == [CLEAN] * 2
    assert all(move.rows is None for move in moves)


def test_a_move_towards_more_noise_is_refused(noise_path):
    with pytest.raises(ValueError, match="noisy to clean"):
        noise_path.substeps([499], [749], 4)


def test_alpha_and_sigma_are_a_unit_vector_and_clean_is_exact(noise_path):
    timesteps = torch.tensor([999, 500, 0, CLEAN])
    alpha, sigma = noise_path.alpha_sigma(timesteps)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(4, dtype=torch.float64), atol=1e-15)
    assert (alpha[-1].item(), sigma[-1].item()) == (1.0, 0.0)
    assert alpha.dtype == torch.float64


def test_add_noise_gives_pure_noise_only_at_the_last_timestep(noise_path):
    clean, noise = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    timesteps = torch.tensor([999, 998, CLEAN])
    noisy = noise_path.add_noise(clean, noise, timesteps, pure_noise_at_last=True)
    plain = noise_path.add_noise(clean, noise, timesteps)
    assert torch.equal(noisy[0], noise[0])
    assert torch.equal(noisy[1:], plain[1:])
    assert not torch.equal(plain[0], noise[0])
    assert torch.equal(noisy[2], clean[2])


def test_schedules_do_not_depend_on_the_models_dtype(noise_path):
    sample = randn(1, 1, 1, 1).to(torch.bfloat16)
    alpha, _ = noise_path.alpha_sigma(torch.tensor([999]), dtype=torch.float32)
    assert noise_path.alphas_cumprod.dtype == torch.float64
    assert abs(alpha.item() - noise_path.alphas_cumprod[999].sqrt().item()) < 1e-8
    assert noise_path.add_noise(sample, sample, torch.tensor([3])).dtype == torch.bfloat16


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(ValueError, match="scaled_linear"):
        make_betas("cosine", beta_start=0.1, beta_end=0.2, num_train_timesteps=10)
    with pytest.raises(ValueError, match="1 to 1000"):
        trailing_nodes(0)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step():
    betas = make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
    plain, rescaled = (VariancePreserving.from_betas(betas, zero_terminal_snr=z) for z in (False, True))
    assert rescaled.alphas_cumprod[-1].item() == 0.0
    assert abs(rescaled.alphas_cumprod[0].item() - plain.alphas_cumprod[0].item()) < 1e-15
