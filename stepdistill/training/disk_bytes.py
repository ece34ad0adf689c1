"""How many bytes a rung writes while it is trained: its checkpoints, its LoRA and its previews."""

from stepdistill.config import RunConfig, Rung
from stepdistill.disk.space import png_bytes

_FLOAT32 = 4
_OF_ADAM = 3  # a parameter and Adam's two moments


def rung_bytes(config: RunConfig, rung: Rung, *, parameters: int, encoder: int, size: tuple[int, int]) -> int:
    """Bytes of a rung's LoRA, of the most checkpoints that are there at once (those that stay, and the next one), and of its
    previews.

    Args:
        config: the run.
        rung: one of its rungs.
        parameters: number of the LoRA's parameters. A discriminator with a LoRA of its own has at most as many.
        encoder: number of parameters of the U-Net's encoder and mid-block, of which a full trunk is a copy.
        size: (height, width) of a preview's pictures in pixels.
    """
    lora, options = _FLOAT32 * parameters, config.training.checkpoint
    trunks = {"lora": parameters, "full": encoder, "frozen": 0}
    trunk = max((trunks[p.discriminator.trunk] for p in rung.phases if p.adversary is not None), default=0)
    student = _OF_ADAM * lora + (lora if config.training.ema_decay > 0 else 0)
    checkpoint = student + _OF_ADAM * _FLOAT32 * trunk
    most = options.keep + 1 if options.every_minutes is not None else 1
    return lora + most * checkpoint + preview_pictures(config, rung) * png_bytes(size)


def preview_pictures(config: RunConfig, rung: Rung) -> int:
    """Number of pictures in all previews of a rung: student and teacher for each prompt."""
    every = config.training.preview_steps
    drawn = sum(1 + (phase.max_train_steps // every if every else 0) for phase in rung.phases)
    return drawn * 2 * len(config.preview.prompts)
