"""How many bytes a rung writes while it is trained: its checkpoints, its LoRA and its previews."""

import re

import torch

from stepdistill.config import RunConfig, Rung
from stepdistill.disk.space import png_bytes

_FLOAT32 = 4
_OF_ADAM = 3  # a parameter and Adam's two moments
_ENCODER = re.compile(r"down_blocks|mid_block")


def rung_bytes(config: RunConfig, rung: Rung, *, parameters: int, encoder: int, size: tuple[int, int]) -> int:
    """Bytes of a rung's LoRA, of its checkpoints, and of its previews.

    Args:
        config: the run.
        rung: one of its rungs.
        parameters: number of the LoRA's parameters.
        encoder: `encoder_parameters` of the U-Net.
        size: (height, width) of a preview's images in pixels.
    """
    checkpoints = checkpoints_bytes(config, rung, parameters=parameters, encoder=encoder)
    return _FLOAT32 * parameters + checkpoints + preview_images(config, rung) * png_bytes(size)


def checkpoints_bytes(config: RunConfig, rung: Rung, *, parameters: int, encoder: int) -> int:
    """Bytes of the most checkpoints of a rung that are there at once: the newest ones, the one at the phase's start, and the
    next one. A discriminator with a LoRA counts as many parameters as the student's, which are at least as many."""
    lora = _FLOAT32 * parameters
    trunks = {"lora": parameters, "full": encoder, "frozen": 0}
    trunk = max((trunks[p.discriminator.trunk] for p in rung.phases if p.adversary is not None), default=0)
    carried = _FLOAT32 * trunk if any(p.discriminator.start == "carried" for p in rung.phases) else 0
    averages = (config.training.ema_decay > 0) + any(phase.teacher == "ema" for phase in rung.phases)
    fake_score = _OF_ADAM * lora if any(phase.matches_distributions for phase in rung.phases) else 0
    student = _OF_ADAM * lora + averages * lora
    each = student + fake_score + _OF_ADAM * _FLOAT32 * trunk + carried
    return each * _at_once(config)


def whole_network_bytes(config: RunConfig, *, parameters: int) -> int:
    """Bytes of the most checkpoints that are there at once while all `parameters` of a smaller base are trained."""
    each = _FLOAT32 * parameters * (_OF_ADAM + (config.training.ema_decay > 0))
    return each * _at_once(config)


def _at_once(config: RunConfig) -> int:
    options = config.training.checkpoint
    return 2 + (options.keep if options.every_minutes is not None else 0)


def encoder_parameters(unet: torch.nn.Module) -> int:
    """Number of parameters of the U-Net's encoder and mid-block, of which a full trunk is a copy."""
    return sum(p.numel() for name, p in unet.named_parameters() if _ENCODER.search(name))


def preview_images(config: RunConfig, rung: Rung) -> int:
    """Number of images in all previews of a rung: student and teacher for each prompt."""
    every = config.training.preview_steps
    drawn = sum(1 + ((phase.max_train_steps - 1) // every if every else 0) for phase in rung.phases)
    return drawn * 2 * len(config.preview.prompts)
