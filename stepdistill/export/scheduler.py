"""The scheduler that samples a rung as it is trained: DDIM on the teacher's betas, or Euler on the teacher's flow, at the
trained timesteps."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.grid import trailing_nodes
from stepdistill.teacher.facts import DEFAULT_TIMESTEPS
from stepdistill.teacher.loading import load_schedule
from stepdistill.teacher.scheduler import is_flow_scheduler

StudentScheduler: TypeAlias = DDIMScheduler | FlowMatchEulerDiscreteScheduler


def student_scheduler(
    teacher_scheduler_config: Mapping[str, Any], prediction_type: str, *, start_timestep: int | None = None
) -> StudentScheduler:
    """Euler on a flow, whose steps `step_options` places; else DDIM on the teacher's betas with settings for few steps:
    trailing spacing, alpha 1 at the end, no clipping.

    At 8, 4, 2 and 1 steps its (timestep, prev_timestep) pairs are exactly those of the training.

    start_timestep: the betas end there, so that a single trailing step gives the U-Net pure noise at this timestep.
    """
    if is_flow_scheduler(teacher_scheduler_config):
        kept = ("num_train_timesteps", "shift")
        options = {key: teacher_scheduler_config[key] for key in kept if key in teacher_scheduler_config}
        return FlowMatchEulerDiscreteScheduler(**options)
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    noise_schedule = {
        key: teacher_scheduler_config[key]
        for key in (*betas, "num_train_timesteps")
        if key in teacher_scheduler_config
    }
    if start_timestep is not None:
        noise_path, _ = load_schedule(teacher_scheduler_config)
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


def step_options(scheduler: Any, steps: int) -> dict[str, Any]:
    """Arguments of a pipeline's call and of set_timesteps beside the number of steps: on a flow the sigmas before the shift,
    because Euler's own grid takes its last step from nearly clean samples; {} for other schedulers."""
    if not is_flow_scheduler({"_class_name": type(scheduler).__name__}):
        return {}
    count = scheduler.config.get("num_train_timesteps", DEFAULT_TIMESTEPS)
    return {"sigmas": [(node + 1) / count for node in trailing_nodes(steps, num_train_timesteps=count)]}


def trained_timesteps(scheduler: StudentScheduler, steps: int) -> list[int]:
    """The network's conditioning timesteps when the scheduler samples in `steps` steps, noisiest first, rounded."""
    scheduler_copy = type(scheduler).from_config(scheduler.config)
    scheduler_copy.set_timesteps(steps, **step_options(scheduler, steps))
    return [round(float(t)) for t in scheduler_copy.timesteps]
