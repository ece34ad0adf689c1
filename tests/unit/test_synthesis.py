"""Latents that the teacher draws for prompts: their noise must stay the same over versions, because caches are continued."""

import pytest
import torch

from stepdistill.data.synthesis import Synthesis
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.shared_network import SharedNetwork
from tests.conftest import make_conditioning


def test_the_noise_of_a_latent_is_a_function_of_seed_and_number_that_never_changes(
    tiny_unet, noise_path, monkeypatch
):
    monkeypatch.setattr(Denoiser, "rollout", lambda _teacher, noise, _moves, _conditioning: noise)
    teacher = Denoiser(SharedNetwork(tiny_unet), None, noise_path, "epsilon")
    synthesis = Synthesis(teacher, steps=4, shape=(4,), seed=3, batch_size=2)
    latents = synthesis.latents(make_conditioning(3), [0, 5, 7])
    assert latents[:, 0].tolist() == pytest.approx([-0.64025986, 0.74409217, -0.72004181], abs=1e-6)
    assert torch.equal(latents[1:], synthesis.latents(make_conditioning(2), [5, 7]))
