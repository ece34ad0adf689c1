"""Optimisers of student and discriminator, by default Adam as in the paper, with warm-up and decay; the moving average.

Both work on the flat float32 masters of a role's weights (models/trained_weights.py).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stepdistill.models.trained_weights import TrainedWeights


class RoleOptimizer:
    """The optimiser of one role's weights, with linear warm-up and cosine decay.

    While it is open, each gradient that a backward pass gives to a parameter is added to the master's float32 gradient and
    dropped at once. So micro-batches add up in float32, and no role's gradients are held in two forms.

    kind: one of OPTIMIZERS.
    betas: (0, .99) if `adversarial`, else (.9, .999), as in the paper.
    lr_warmup_steps: limited to a tenth of max_train_steps. With a longer warm-up the cosine would fall before the warm-up
    ends, and a short phase would never reach its learning rate.
    """

    def __init__(
        self,
        weights: TrainedWeights,
        *,
        learning_rate: float,
        adversarial: bool,
        max_train_steps: int,
        lr_warmup_steps: int,
        lr_final_fraction: float,
        kind: str = "adam",
    ) -> None:
        self.weights = weights
        betas = (0.0, 0.99) if adversarial else (0.9, 0.999)
        weights.master.grad = torch.zeros_like(weights.master)
        parts = weights.views(weights.master.grad)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_adds_to(parts[name]))
            for name, parameter in weights.parameters.items()
        ]
        self.optimizer = OPTIMIZERS[kind](weights.master, learning_rate, betas)

        self.base_rate, self.updates = learning_rate, 0
        self._schedule = functools.partial(
            rate_fraction,
            max_train_steps=max_train_steps,
            lr_warmup_steps=min(lr_warmup_steps, max_train_steps // 10),
            lr_final_fraction=lr_final_fraction,
        )
        self._set_rate(self.learning_rate)

    def close(self) -> None:
        """Gives the parameters' gradients back to autograd, and frees the master's gradient."""
        for hook in self._hooks:
            hook.remove()
        self.weights.master.grad = None

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self.base_rate * self._schedule(self.updates)

    def set_base_rate(self, learning_rate: float) -> None:
        """Changes the learning rate that the schedule is applied to, from the next update on."""
        self.base_rate = learning_rate
        self._set_rate(self.learning_rate)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Clips the gradients' total norm to max_grad_norm; returns the norm before clipping, a scalar."""
        return torch.nn.utils.clip_grad_norm_([self.weights.master], max_grad_norm)

    def step(self) -> None:
        """Updates the weights, advances the schedule by one step, drops the gradients."""
        self.optimizer.step()
        self.updates += 1
        self._set_rate(self.learning_rate)
        self.weights.refresh()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=False)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that the optimiser keeps between updates, such as Adam's moments."""
        return list(_tensors(self.optimizer.state[self.weights.master]).values())

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's tensors and numbers, the shapes of their parameters, and the schedule's place."""
        group = self.optimizer.param_groups[0]
        return {
            "shapes": {name: list(shape) for name, shape in self.weights.shapes().items()},
            "tensors": _tensors(self.optimizer.state[self.weights.master]),
            "numbers": {
                k: v for k, v in group.items() if k not in ("params", "lr") and isinstance(v, int | float)
            },
            "updates": self.updates,
            "base_rate": self.base_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state_dict` of an optimiser; ValueError unless its parameters had these names and shapes, and
        it was of the same kind."""
        check_shapes("the optimiser's state", self.weights, state["shapes"])
        self.updates, self.base_rate = state["updates"], state["base_rate"]
        self.optimizer.param_groups[0].update(state["numbers"])
        if state["tensors"]:  # empty before the first update
            self._make_tensors()
            own = _tensors(self.optimizer.state[self.weights.master])
            if own.keys() != state["tensors"].keys():
                raise ValueError(
                    f"the optimiser's state has {', '.join(state['tensors'])}; here it has {', '.join(own)}"
                )
            for name, tensor in own.items():
                tensor.copy_(state["tensors"][name])
            self.optimizer.param_groups[0].update(state["numbers"])
        self._set_rate(self.learning_rate)

    def _make_tensors(self) -> None:
        """Makes the optimiser's tensors, by an update with a learning rate of 0 and a gradient of 0."""
        before = self.weights.master.detach().clone()
        self.zero_grad()
        self._set_rate(0.0)
        self.optimizer.step()
        with torch.no_grad():
            self.weights.master.copy_(before)


def rate_fraction(
    update: int, *, max_train_steps: int, lr_warmup_steps: int, lr_final_fraction: float
) -> float:
    """The share of the learning rate that an update uses: linear warm-up times cosine decay to lr_final_fraction."""
    warmup = min((update + 1) / (lr_warmup_steps + 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * min(update / max_train_steps, 1.0)))
    return warmup * (lr_final_fraction + (1 - lr_final_fraction) * cosine)


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an optimiser's state by name; one in 8 bits as its codes and scales."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if is_traceable_wrapper_subclass(value):
            parts = value.__tensor_flatten__()[0]
            tensors |= {f"{name}.{part}": getattr(value, part) for part in parts}
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
    return tensors


_Betas = tuple[float, float]


def _adam(master: torch.nn.Parameter, rate: float, betas: _Betas) -> torch.optim.Optimizer:
    return torch.optim.Adam([master], lr=rate, betas=betas, fused=True)


def _adamw(master: torch.nn.Parameter, rate: float, betas: _Betas) -> torch.optim.Optimizer:
    return torch.optim.AdamW([master], lr=rate, betas=betas, weight_decay=0.01, fused=True)


def _adam8bit(master: torch.nn.Parameter, rate: float, betas: _Betas) -> torch.optim.Optimizer:
    from torchao.optim import Adam8bit

    return Adam8bit([master], lr=rate, betas=betas)


def _prodigy(master: torch.nn.Parameter, rate: float, betas: _Betas) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy([master], lr=rate, betas=betas, safeguard_warmup=True)


OPTIMIZERS: dict[str, Callable[[torch.nn.Parameter, float, _Betas], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "adam8bit": _adam8bit,
    "prodigy": _prodigy,
}


def _adds_to(part: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's gradient to `part` and drops it."""

    def add(parameter: torch.Tensor) -> None:
        if (
            parameter.grad is not None
        ):  # a frozen parameter is an input of compiled code, which gives it no gradient
            part.add_(parameter.grad)
            parameter.grad = None

    return add


class MovingAverage:
    """The exponential moving average of a role's weights, with diffusers' warm-up of the decay.

    It stays on the CPU, also if the weights are on a GPU: it is used once an update, and at the end of the phase. A copy of
    the weights travels there while the CPU prepares the next update, and is averaged after that update.
    """

    def __init__(self, weights: TrainedWeights, *, decay: float) -> None:
        self._weights = weights
        on_gpu = weights.master.is_cuda
        self._copy = (
            torch.empty_like(weights.master, device="cpu", pin_memory=on_gpu).detach().requires_grad_(True)
        )
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._is_behind = False
        self._average = EMAModel([weights.master.detach().cpu()], decay=decay, foreach=True)

    def update(self) -> None:
        """Updates the average; call it after each update of the weights."""
        self._catch_up()
        self._copy.data.copy_(self._weights.master.data, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._is_behind = True

    def _catch_up(self) -> None:
        """Averages the last copy, if that is still to be done."""
        if self._is_behind:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._average.step([self._copy])
            self._is_behind = False

    def copy_to_parameters(self) -> None:
        """Replaces the weights by their average."""
        self._catch_up()
        self._average.copy_to([self._weights.master])
        self._weights.refresh()

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the number of updates so far."""
        self._catch_up()
        averages = self._weights.views(self._average.shadow_params[0])
        return {"parameters": averages, "updates": self._average.optimization_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; ValueError unless its parameters had these names and shapes."""
        averages: Mapping[str, torch.Tensor] = state["parameters"]
        shapes = {name: of.shape for name, of in averages.items()}
        check_shapes("the moving average", self._weights, shapes)
        self._average.optimization_step, self._is_behind = state["updates"], False
        for name, average in self._weights.views(self._average.shadow_params[0]).items():
            average.copy_(averages[name])


def check_shapes(what: str, weights: TrainedWeights, shapes: Mapping[str, Sequence[int]]) -> None:
    """ValueError unless a state has these weights' names and shapes; it names the first one that differs."""
    expected = weights.shapes()
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f"{what} lacks {name}, which is trained here")
        if name not in expected:
            raise ValueError(f"{what} has {name}, which is not trained here")
        if tuple(expected[name]) != tuple(shapes[name]):
            raise ValueError(
                f"{what} has {name} in shape {tuple(shapes[name])}; here its shape is {tuple(expected[name])}"
            )
