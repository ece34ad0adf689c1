"""The objectives that a phase may have, and what config, plan and report must know of each. No torch.

A new objective is a function of samples, in a file of its own, and one line here.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveKind:
    """What is known of an objective before anything is computed.

    student_loss            the function from Samples and Phase to the student's Loss, as "module:function"
    teacher                 what it asks the teacher for: its moves from t to s, one prediction at x_t, its moves if they are
                            D's real samples, its features at x_t, which the first move gives too, or nothing
    critic                  the role that learns beside the student and that the student's loss asks; None if there is none
    critic_loss             the function that gives the critic's Loss
    discriminator_forwards  what its discriminator adds to the cost of a sample, in forward passes of the bare U-Net
                            (computed on SDXL); None if it has no discriminator
    """

    student_loss: str
    teacher: Literal["moves", "prediction", "real", "features", "nothing"]
    critic: Literal["discriminator", "fake_score"] | None = None
    critic_loss: str | None = None
    discriminator_forwards: float | None = None


_LOSSES = "stepdistill.training.losses"


def _adversarial(discriminator_forwards: float) -> ObjectiveKind:
    return ObjectiveKind(
        f"{_LOSSES}:adversarial_student",
        "real",
        "discriminator",
        f"{_LOSSES}:adversarial_discriminator",
        discriminator_forwards,
    )


OBJECTIVES: dict[str, ObjectiveKind] = {
    "mse": ObjectiveKind(f"{_LOSSES}:mse", "moves"),
    "convert": ObjectiveKind(f"{_LOSSES}:convert", "prediction"),
    "paired": _adversarial(5.25),
    "single": _adversarial(3.55),
    "dmd": ObjectiveKind(f"{_LOSSES}:dmd_student", "nothing", "fake_score", f"{_LOSSES}:fake_score"),
    "output": ObjectiveKind(f"{_LOSSES}:output", "prediction"),
    "denoise": ObjectiveKind(f"{_LOSSES}:denoise", "nothing"),
    "l2": ObjectiveKind(f"{_LOSSES}:l2", "features"),
    "attention": ObjectiveKind(f"{_LOSSES}:attention", "features"),
    "gram": ObjectiveKind(f"{_LOSSES}:gram", "features"),
    "kernel": ObjectiveKind(f"{_LOSSES}:kernel", "features"),
    "relations": ObjectiveKind(f"{_LOSSES}:relations", "features"),
}


def is_adversarial(kind: str) -> bool:
    """Whether an objective of this name has a discriminator; False for a name that this version does not know."""
    return kind in OBJECTIVES and OBJECTIVES[kind].critic == "discriminator"


def has_critic(kind: str) -> bool:
    """Whether another role learns beside the student, so that the student's loss is no distance; False for a name that this
    version does not know."""
    return kind in OBJECTIVES and OBJECTIVES[kind].critic is not None


def compares_features(kind: str) -> bool:
    """Whether an objective of this name compares features; False for a name that this version does not know."""
    return kind in OBJECTIVES and OBJECTIVES[kind].teacher == "features"


def check_kind(kind: str) -> str:
    """The name; ValueError if there is no such objective."""
    if kind not in OBJECTIVES:
        raise ValueError(", ".join(OBJECTIVES))
    return kind
