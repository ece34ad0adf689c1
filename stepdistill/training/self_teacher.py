"""The moving average of the student as its own teacher (`teacher: ema`), as in Mean Teacher (Tarvainen and Valpola 2017).

    average <- decay * average + (1 - decay) * student     after each update, in float32

The average begins as the student of the phase's start. It answers through the adapter that otherwise holds the rung before.
"""

from collections.abc import Mapping

import torch

from stepdistill.models.adapters import adapter_parameters, file_key
from stepdistill.models.shared_network import STUDENT, TEACHER, SharedNetwork


class SelfTeacher:
    """Keeps the teacher's adapter of a network at the moving average of the student's weights.

    decay: share of the average that stays in an update, 0 to 1.
    """

    def __init__(self, network: SharedNetwork, *, decay: float) -> None:
        self._decay, self._weights = decay, network.weights(STUDENT)
        self._average = self._weights.master.detach().clone()
        parameters = adapter_parameters(network.model, TEACHER)
        by_key = {file_key(name, TEACHER): parameter for name, parameter in parameters.items()}
        self._targets = {name: by_key[file_key(name, STUDENT)] for name in self._weights.parameters}
        self._write()

    @torch.no_grad()
    def update(self) -> None:
        """Averages the student's weights in, after an update of them."""
        self._average.lerp_(self._weights.master, 1 - self._decay)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, average in self._weights.views(self._average).items():
            self._targets[name].data.copy_(average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by the names of the student's parameters."""
        return {name: average.clone() for name, average in self._weights.views(self._average).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from a `state_dict`."""
        for name, average in self._weights.views(self._average).items():
            average.copy_(state[name])
        self._write()
