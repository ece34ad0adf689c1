"""The objectives that a phase may have, and what config, plan and report must know of each. No torch.

A new objective is a function of samples, in a file of its own, and one line here.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveKind:
    """What is known of an objective before anything is computed.

    losses                  the function from Samples and Phase to Losses, as "module:function"
    teacher                 what it asks the teacher for: its moves from t to s, one prediction at x_t, its moves if they are
                            D's real samples, or nothing
    discriminator_forwards  what its discriminator adds to the cost of a sample, in forward passes of the bare U-Net
                            (computed on SDXL); None if it has no discriminator
    """

    losses: str
    teacher: Literal["moves", "prediction", "real", "nothing"]
    discriminator_forwards: float | None = None


OBJECTIVES: dict[str, ObjectiveKind] = {
    "mse": ObjectiveKind("stepdistill.training.losses:mse", "moves"),
    "convert": ObjectiveKind("stepdistill.training.losses:convert", "prediction"),
    "paired": ObjectiveKind("stepdistill.training.losses:adversarial_pair", "real", 5.25),
    "single": ObjectiveKind("stepdistill.training.losses:adversarial_pair", "real", 3.55),
}


def is_adversarial(kind: str) -> bool:
    """Whether an objective of this name has a discriminator; False for a name that this version does not know."""
    return kind in OBJECTIVES and OBJECTIVES[kind].discriminator_forwards is not None


def check_kind(kind: str) -> str:
    """The name; ValueError if there is no such objective."""
    if kind not in OBJECTIVES:
        raise ValueError(", ".join(OBJECTIVES))
    return kind
