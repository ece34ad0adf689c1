"""A one-step rung with start_timestep: it is drawn as it is trained, which only DDIM does."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from stepdistill.diffusion.solver import move
from stepdistill.export.rung import export_rung
from stepdistill.models.shared_network import STUDENT
from stepdistill.sampling import FewStepWarning, load_few_step
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.loading import load_noise_path
from tests.integration.exported import rung_of
from tests.integration.few_step import PROMPT, latents, pipeline_of, without_warning


@pytest.fixture(scope="module", params=[399, 499])
def one_step(request, tmp_path_factory):
    """(start_timestep, teacher's folder, exported folder, network)."""
    config, teacher, network = rung_of(
        tmp_path_factory.mktemp("start"),
        "sd15",
        "export.dtype=float32",
        steps=1,
        start_timestep=request.param,
    )
    return request.param, teacher, export_rung(config, 1), network


@torch.no_grad()
def as_trained(pipeline, teacher, network, start):
    """The move of training from pure noise to the clean latents; the U-Net is given the timestep `start`."""
    noise_path, kind = load_noise_path(TeacherFacts.of_folder(teacher).scheduler)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 32 // 8, 32 // 8, generator=generator)
    embeds = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
    timestep = torch.tensor([start])
    with network.using(STUDENT):
        output = network.model(noise, timestep, embeds, return_dict=False)[0]
    return move(output, noise, timestep, torch.tensor([-1]), noise_path=noise_path, prediction_type=kind)


def test_a_rung_with_start_timestep_is_drawn_as_it_is_trained(one_step):
    start, teacher, folder, network = one_step
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    drawn = without_warning(latents, pipeline, PROMPT)
    trained = as_trained(pipeline, teacher, network, start)
    assert (drawn - trained).abs().max() <= 1e-5 * trained.abs().max()


def test_euler_gives_another_image_and_is_warned_of(one_step):
    """Its first call sees the noise times sigma / sqrt(sigma^2 + 1), 24 % less at 399 and 15 % less at 499."""
    start, teacher, folder, network = one_step
    pipeline = pipeline_of(teacher)
    load_few_step(pipeline, folder)
    noise_path, _ = load_noise_path(TeacherFacts.of_folder(teacher).scheduler)
    _, share = noise_path.alpha_sigma(torch.tensor([start]))
    assert float(share) == pytest.approx({399: 0.76, 499: 0.85}[start], abs=0.005)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.warns(
        FewStepWarning, match=f"begins with the noise scaled by {float(share):.2f}.*allowed: DDIMScheduler"
    ):
        euler = latents(pipeline, PROMPT)
    trained = as_trained(pipeline, teacher, network, start)
    assert (euler - trained).abs().max() > 0.05 * trained.abs().max()
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    without_warning(latents, pipeline, PROMPT)
