"""Optimisers of the roles: Adam as the paper has it, warm-up and decay, one guarded update."""

import math
from collections.abc import Sequence

import torch


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; nothing was updated."""


class RoleOptimizer:
    """Adam over one role's parameters, with linear warm-up and cosine decay, no weight decay.

    betas: (.9, .999) for mse, (0, .99) for adversarial phases (section 4 of the recipe's table, from the paper).
    lr_warmup_steps: a tenth of max_train_steps at most. With a longer warm-up the cosine has fallen before the warm-up ends,
    and a short phase never trains at its learning rate.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        *,
        learning_rate: float,
        adversarial: bool,
        max_train_steps: int,
        lr_warmup_steps: int,
        lr_final_fraction: float,
    ) -> None:
        self.parameters = list(parameters)
        warmup_steps = min(lr_warmup_steps, max_train_steps // 10)
        betas = (0.0, 0.99) if adversarial else (0.9, 0.999)
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=betas)

        def scale(step: int) -> float:
            warmup = min((step + 1) / (warmup_steps + 1), 1.0)
            cosine = 0.5 * (1 + math.cos(math.pi * min(step / max_train_steps, 1.0)))
            return warmup * (lr_final_fraction + (1 - lr_final_fraction) * cosine)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)

    @property
    def learning_rate(self) -> float:
        """Of the update to come."""
        return float(self.schedule.get_last_lr()[0])

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Clips the gradients' total norm to max_grad_norm; returns the norm before, a scalar."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)

    def step(self) -> None:
        """One update, one step of the schedule, gradients dropped."""
        self.optimizer.step()
        self.schedule.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
