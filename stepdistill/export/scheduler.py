"""The scheduler that samples a rung as it is trained: DDIM on the teacher's betas, at the trained timesteps."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler

from stepdistill.teacher.loading import load_noise_path


def student_scheduler(
    teacher_scheduler_config: Mapping[str, Any], prediction_type: str, *, start_timestep: int | None = None
) -> DDIMScheduler:
    """DDIM on the teacher's betas with settings for few steps: trailing spacing, alpha 1 at the end, no clipping.

    At 8, 4, 2 and 1 steps its (timestep, prev_timestep) pairs are exactly those of the training.

    start_timestep: the betas end there, so that a single trailing step gives the U-Net pure noise at this timestep.
    """
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    noise_schedule = {
        key: teacher_scheduler_config[key]
        for key in (*betas, "num_train_timesteps")
        if key in teacher_scheduler_config
    }
    if start_timestep is not None:
        noise_path, _ = load_noise_path(teacher_scheduler_config)
        alphas_cumprod = noise_path.alphas_cumprod[: start_timestep + 1]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        noise_schedule |= {
            "trained_betas": (1 - alphas_cumprod / before).tolist(),
            "rescale_betas_zero_snr": False,
        }
        noise_schedule["num_train_timesteps"] = len(alphas_cumprod)
    return DDIMScheduler(
        **noise_schedule,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def trained_timesteps(scheduler: DDIMScheduler, steps: int) -> list[int]:
    """The U-Net's conditioning timesteps when the scheduler samples in `steps` steps, noisiest first."""
    scheduler_copy = DDIMScheduler.from_config(scheduler.config)
    scheduler_copy.set_timesteps(steps)
    return [int(t) for t in scheduler_copy.timesteps]
