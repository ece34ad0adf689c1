"""Scales the objectives of a phase so that each has its share of the student's gradient (`balance: gradient`).

factor_i = w_i n_0 / n_i     w_i: the weight of objective i in this update
                             n_i: the norm of the gradient of its loss alone; n_0: that of the first objective

So the norms of the gradients that are added are in proportion to the weights, and the first loss keeps its scale. The norms
are measured on every tenth update of the student, by a backward pass for each objective, and averaged with those of earlier
measurements.
"""

from collections.abc import Mapping

import torch

from stepdistill.config import Phase
from stepdistill.models.trained_weights import TrainedWeights
from stepdistill.runtime import Runtime
from stepdistill.training.losses import Weights

MEASURED_EVERY = 10
"""Updates from one measurement of the norms to the next."""
_NEWEST = 0.5
"""The share of a new measurement in the average of norms."""


class GradientBalance:
    """The factors of a phase's objectives, and the gradients of each during an update that measures.

    phase: its objectives and their weights.
    weights: the student's trained weights, whose optimiser holds the gradient.
    """

    def __init__(self, phase: Phase, weights: TrainedWeights) -> None:
        self._phase, self._weights = phase, weights
        self._norms: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}

    def measures(self, step: int) -> bool:
        """Whether update `step`, counted from 0, measures the norms: every tenth of those in which the student learns."""
        if not self._phase.student_learns_at(step):
            return False
        return step // self._phase.updates_per_student_update % MEASURED_EVERY == 0

    def factors(self, step: int) -> Weights:
        """The factor of each objective's loss in update `step`; before the first measurement, its weight."""
        return {
            kind: weight * self._ratio(kind) if self._norms else weight
            for kind, weight in self._phase.weights_at(step).items()
        }

    def _ratio(self, kind: str) -> torch.Tensor:
        """n_0 / n_i; 1 if one of them is 0."""
        first, norm = self._norms[self._phase.kinds[0]], self._norms[kind]
        return torch.where((first > 0) & (norm > 0), first / norm, torch.ones_like(norm))

    def begin(self) -> None:
        """Begins to sum the gradients of an update that measures."""
        self._gradients = {kind: torch.zeros_like(self._weights.master) for kind in self._phase.kinds}

    def collect(self, kind: str) -> None:
        """Takes the gradient that the backward pass of one objective gave to the master."""
        gradient = self._weights.master.grad
        assert gradient is not None, "the student's optimiser holds its gradient"
        self._gradients[kind].add_(gradient)
        gradient.zero_()

    def combine(self, step: int, runtime: Runtime) -> dict[str, torch.Tensor]:
        """Makes the master's gradient the sum of the collected ones, each times its factor; returns their norms.

        The gradients are means over the processes, in float16 times the loss scale. A norm that is not finite, as after an
        overflow, is not averaged.
        """
        master, norms = self._weights.master, {}
        assert master.grad is not None, "the student's optimiser holds its gradient"
        for kind, gradient in self._gradients.items():
            master.grad.copy_(gradient)
            runtime.average_gradient(master)
            gradient.copy_(master.grad)
            norms[kind] = gradient.norm() / runtime.loss_scale
        self._average(norms)
        master.grad.zero_()
        for kind, factor in self.factors(step).items():
            master.grad.add_(factor * self._gradients[kind])
        self._gradients = {}
        return {f"{kind}_grad_norm": norm for kind, norm in norms.items()}

    def _average(self, norms: Mapping[str, torch.Tensor]) -> None:
        for kind, norm in norms.items():
            before = self._norms.get(kind, torch.zeros_like(norm))
            after = torch.where(before > 0, torch.lerp(before, norm, _NEWEST), norm)
            self._norms[kind] = torch.where(norm.isfinite(), after, before)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged norms by the objective's kind; empty before the first measurement."""
        return dict(self._norms)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from a `state_dict`."""
        self._norms = {kind: norm.to(self._weights.master.device) for kind, norm in state.items()}
