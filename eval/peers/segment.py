"""Distribution matching on a rung's own segment: the student's x_s, re-noised to t' between s and its own t.

real score   the guided base             fake score   a LoRA that begins as the rung of guidance alone, the score of what the
                                                       guided base draws, and follows the student's x_s
x_t' = r x_s + b n,  r = alpha_t' / alpha_s,  b^2 = sigma_t'^2 - r^2 sigma_s^2
fake         || (b / sigma_t') epsilon_fake(x_t') - n ||^2: x_s is no x_0 for s > 0, so the regression is on what was added
             (Song and Ermon 2019: E[-n / b | x_t'] is the score of the noised distribution, whatever x_s is)
student      1/2 || x_s - sg(x_s - g) ||^2,  g = (x0_fake - x0_real) / mean |x_s - x0_real|, as DMD2
"""

import math
import shutil

import torch

from stepdistill.config import RunConfig
from stepdistill.diffusion.prediction import convert
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.ladder import read_lora
from stepdistill.models import adapters
from stepdistill.models.roles import STUDENT
from stepdistill.rng import derive_seed
from stepdistill.rungs import read_rung, rung_folder
from stepdistill.training.steps import Denoisers, noisy_latents, student_move

from . import dmd2
from .loop import Loop, is_finished
from .train import FAKE

LEARNING_RATE, FAKE_LEARNING_RATE = 1e-4, 1e-3
# student and fake score forward and backward, the guided real one
FORWARDS = 2 * (1.083 + 1.268) + 2


def renoise(
    sample: torch.Tensor,
    noise: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    *,
    schedule: NoiseSchedule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t' (B, ...) of x_s at start (B,), noised further to end (B,), and b / sigma_t' (B, 1, ...)."""
    alpha_s, sigma_s = schedule.alpha_sigma(start, ndim=sample.ndim, dtype=sample.dtype)
    alpha, sigma = schedule.alpha_sigma(end, ndim=sample.ndim, dtype=sample.dtype)
    ratio = alpha / alpha_s
    added = (sigma**2 - ratio**2 * sigma_s**2).clamp(min=0).sqrt()
    return ratio * sample + added * noise, added / sigma


def score_timesteps(
    uniform: torch.Tensor, timesteps: torch.Tensor, prev_timesteps: torch.Tensor
) -> torch.Tensor:
    """t' (B,) uniform in (s, t] by `uniform` (B,) in [0, 1), within DMD2's range of scores."""
    low, high = dmd2.SCORE_RANGE
    start, end = prev_timesteps.clamp(min=low - 1), timesteps.clamp(min=low, max=high)
    return start + 1 + (uniform * (end - start)).long().clamp(max=end - start - 1)


def train_segment(config: RunConfig, *, steps: int, updates: int) -> None:
    """A LoRA in run_dir/segment-<steps>, from the finished rung of so many steps, with that rung's scheduler beside it."""
    folder, record = config.run_dir / f"segment-{steps}", read_rung(config.run_dir, steps)
    assert record is not None, f"rung {steps} is not finished"
    if is_finished(folder, updates=updates, learning_rate=LEARNING_RATE, start=record.sha256):
        return
    loop = Loop(config, ("segment", steps), steps)
    roles, schedule, kind = loop.shared.roles, loop.shared.schedule, loop.shared.base_prediction_type
    adapters.load_adapter_state(roles.unet, STUDENT, read_lora(config.run_dir, steps))
    fake = roles.add_role(FAKE, rank=config.lora.rank, seed=derive_seed(config.seed, "segment", steps))
    adapters.load_adapter_state(roles.unet, FAKE, read_lora(config.run_dir, config.ladder[0].student_steps))
    of_student = loop.optimizer(roles.student_parameters, LEARNING_RATE, updates)
    of_fake = loop.optimizer(fake, FAKE_LEARNING_RATE, updates)
    nets = Denoisers(
        roles=roles,
        schedule=schedule,
        unconditional=loop.shared.cache.unconditional,
        teacher_prediction_type=kind,
        student_prediction_type=record.prediction_type,
        guidance_scale=1.0,
        start_timestep=record.start_timestep,
    )
    with loop.progress(f"segment {steps}", updates) as bar:
        for step in range(updates):
            batch = loop.batch(step)
            told, guided = batch.conditioning, loop.guided(batch.conditioning)
            noise, at = (
                loop.normal(step, "score"),
                score_timesteps(loop.uniform(step, "score"), batch.timesteps, batch.prev_timesteps),
            )
            moved = student_move(nets, noisy_latents(nets, batch), batch)
            noisy, weight = renoise(moved.detach(), noise, batch.prev_timesteps, at, schedule=schedule)
            with roles.role(FAKE):
                output = roles.predict(noisy, at, told)
            found = output.detach()
            originals = [
                convert(o, noisy, at, schedule=schedule, prediction_type=kind, target="sample")
                for o in (found, guided(noisy, at))
            ]
            scale = (moved.detach() - originals[1]).abs().flatten(1).mean(dim=1).clamp(min=1e-6)
            toward = (originals[0] - originals[1]) / scale.view(-1, 1, 1, 1)
            matching = 0.5 * (moved - (moved - toward).detach()).square().mean()
            epsilon = convert(output, noisy, at, schedule=schedule, prediction_type=kind, target="epsilon")
            followed = (weight * epsilon - noise).square().mean()
            shown = {"loss": loop.update(of_student, matching), "fake loss": loop.update(of_fake, followed)}
            bar.update(step + 1, shown)
    loop.finish(folder, updates=updates, learning_rate=LEARNING_RATE, start=record.sha256, forwards=FORWARDS)
    shutil.copytree(
        rung_folder(config.run_dir, steps) / "scheduler", folder / "scheduler", dirs_exist_ok=True
    )


def updates_for(forwards: float, *, batch_size: int) -> int:
    """Updates that so many U-Net forwards pay for."""
    return max(1, math.floor(forwards / FORWARDS / batch_size))
