"""Optimisers of student and discriminator: Adam as in the paper, with warm-up and decay; the student's moving average."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel


class RoleOptimizer:
    """Adam on one role's parameters, with linear warm-up and cosine decay, without weight decay.

    betas: (0, .99) if `adversarial`, else (.9, .999), as in the paper.
    parameters: by the names that `state_dict` uses.
    lr_warmup_steps: limited to a tenth of max_train_steps. With a longer warm-up the cosine would fall before the warm-up
    ends, and a short phase would never reach its learning rate.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        learning_rate: float,
        adversarial: bool,
        max_train_steps: int,
        lr_warmup_steps: int,
        lr_final_fraction: float,
    ) -> None:
        self._names = list(parameters)
        self.parameters = list(parameters.values())
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
        """Learning rate of the next update."""
        return float(self.schedule.get_last_lr()[0])

    def set_base_rate(self, learning_rate: float) -> None:
        """Changes the learning rate that the schedule is applied to, from the next update on."""
        factor = learning_rate / self.base_rate
        state = self.schedule.state_dict()
        scaled = {name: [rate * factor for rate in state[name]] for name in ("base_lrs", "_last_lr")}
        self.schedule.load_state_dict(state | scaled)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    @property
    def base_rate(self) -> float:
        """The learning rate that the schedule is applied to."""
        return float(self.schedule.base_lrs[0])

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Clips the gradients' total norm to max_grad_norm; returns the norm before clipping, a scalar."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)

    def step(self) -> None:
        """Updates the parameters, advances the schedule by one step, drops the gradients."""
        self.optimizer.step()
        self.schedule.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and step by parameter name, and the position in the schedule."""
        moments = self.optimizer.state_dict()["state"]
        by_name = {name: moments[k] for k, name in enumerate(self._names) if k in moments}
        return {"parameters": by_name, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state_dict` of an optimiser; ValueError unless its parameters had these names and shapes."""
        moments = state["parameters"]
        if moments:  # empty before the first update
            shapes = {name: of.get("exp_avg", torch.empty(0)).shape for name, of in moments.items()}
            check_names("the optimiser's state", dict(zip(self._names, self.parameters, strict=True)), shapes)
        whole = self.optimizer.state_dict()
        places = {name: k for k, name in enumerate(self._names)}
        whole["state"] = {places[name]: of_parameter for name, of_parameter in moments.items()}
        self.schedule.load_state_dict(dict(state["schedule"]))
        for group, rate in zip(whole["param_groups"], self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(whole)


class MovingAverage:
    """The exponential moving average of a role's parameters, with diffusers' warm-up of the decay.

    parameters: by the names that `state_dict` uses.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, decay: float) -> None:
        self._parameters = dict(parameters)
        self._average = EMAModel(list(self._parameters.values()), decay=decay, foreach=True)

    def update(self) -> None:
        """Updates the averages; call it after each update of the parameters."""
        self._average.step(self._parameters.values())

    def copy_to_parameters(self) -> None:
        """Replaces the parameters by their averages."""
        self._average.copy_to(self._parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the number of updates so far."""
        averages = dict(zip(self._parameters, self._average.shadow_params, strict=True))
        return {"parameters": averages, "updates": self._average.optimization_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; ValueError unless its parameters had these names and shapes."""
        averages: Mapping[str, torch.Tensor] = state["parameters"]
        check_names("the moving average", self._parameters, {name: of.shape for name, of in averages.items()})
        self._average.optimization_step = state["updates"]
        for name, average in zip(self._parameters, self._average.shadow_params, strict=True):
            average.copy_(averages[name])


def check_names(what: str, parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """ValueError unless a state has these parameters' names and shapes; it names the first one that differs."""
    for name in sorted(parameters.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f"{what} lacks {name}, which is trained here")
        if name not in parameters:
            raise ValueError(f"{what} has {name}, which is not trained here")
        if parameters[name].shape != shapes[name]:
            raise ValueError(
                f"{what} has {name} in shape {tuple(shapes[name])}; here its shape is {tuple(parameters[name].shape)}"
            )
