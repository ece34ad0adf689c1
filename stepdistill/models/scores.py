"""The two scores of distribution matching: the base model's, and a fake score, which is one more adapter on it."""

from dataclasses import dataclass

import torch

from stepdistill.config import Phase
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.shared_network import FAKE_SCORE


@dataclass(frozen=True)
class Scores:
    """real: the undistilled teacher, with guidance; fake: the base model with a LoRA that learns the student's images."""

    real: Denoiser
    fake: Denoiser

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the fake score's weights, for `load_state`."""
        return self.fake.network.adapter_state(FAKE_SCORE)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from a `state`; ValueError unless names and shapes are equal."""
        self.fake.network.load_adapter_state(FAKE_SCORE, state)

    def close(self) -> None:
        """Removes the fake score from the network."""
        self.fake.network.remove_adapter(FAKE_SCORE)


def build_scores(phase: Phase, undistilled: Denoiser, *, rank: int, seed: int) -> Scores | None:
    """The scores that a phase needs; None if no objective of it asks for them. The fake score begins as the base model.

    undistilled: the base model with guidance, whose network gets the adapter.
    rank: of the fake score's LoRA.
    seed: of its initial weights.
    """
    if not phase.matches_distributions:
        return None
    network = undistilled.network
    network.add_adapter(FAKE_SCORE, rank=rank, seed=seed)
    fake = Denoiser(network, FAKE_SCORE, undistilled.noise_path, undistilled.prediction_type, trains=True)
    return Scores(undistilled, fake)
