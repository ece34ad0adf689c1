"""Watches an adversarial phase: does the discriminator D still teach, and does the student stay near its teacher?

certain    D judged at least 99 % of the samples correctly, over about the last 100 updates: its gradients teach little
at chance  D judged 45 to 55 % correctly, over about the last 300 updates: it has learned nothing, or it is broken. This is
           also what is left to D once student and teacher cannot be told apart, so it is only warned of
far        the student's distance to the teacher, measured every 25 updates on 16 samples that stay the same in the phase,
           is more than 4 times what it was at the phase's start; not with distribution matching, which does not ask for
           the teacher's image from the same noise
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepdistill.data.batches import draw_batch
from stepdistill.runtime import Runtime
from stepdistill.training.phase_setup import PhaseSetup
from stepdistill.training.samples import Samples

EVERY = 25
"""Updates between two measurements of the distance."""
SAMPLES, _ROWS = 16, 4
"""Samples that the distance is measured on, and how many of them the networks get at once: even a small micro-batch, which
may be all that the memory holds, needs more memory for its gradients."""
CERTAIN, CHANCE, FAR = 0.99, (0.45, 0.55), 4.0
HORIZON, LONG = 100, 300
"""Updates over which the accuracy is averaged, and after which a D at chance is reported."""


@dataclass(frozen=True)
class Trouble:
    """What is wrong. text: for the message; ends_with_rewind: whether `training.guard: rewind` goes back because of it."""

    kind: str
    text: str
    ends_with_rewind: bool


class AdversaryGuard:
    """Watches the updates of one adversarial phase.

    good_step: the last checked update without trouble that `training.guard: rewind` would go back for.
    """

    def __init__(self, setup: PhaseSetup, runtime: Runtime) -> None:
        self._setup, self._runtime = setup, runtime
        self.good_step = 0
        self._accuracy = [0.5, 0.5]  # of real samples, of the student's
        self._updates, self._at_chance = 0, 0
        self._first_distance: float | None = None
        self._parts: list[tuple[Samples, torch.Tensor]] | None = None

    def begin(self) -> None:
        """Measures the distance before the first update."""
        self._first_distance = self.distance()

    def watch(self, step: int, numbers: dict[str, float]) -> Trouble | None:
        """Looks at the numbers of update number `step`, counted from 1, and adds the distance to them when it is measured.
        Returns the worst trouble."""
        seen = [numbers[f"discriminator_accuracy_{of}"] for of in ("real", "student")]
        weight = max(1 / (self._updates + 1), 1 / HORIZON)  # the plain mean until the horizon is reached
        self._accuracy = [
            mean + weight * (new - mean) for mean, new in zip(self._accuracy, seen, strict=True)
        ]
        self._updates += 1
        is_at_chance = all(CHANCE[0] <= mean <= CHANCE[1] for mean in self._accuracy)
        self._at_chance = self._at_chance + 1 if is_at_chance else 0
        far = self._far(step, numbers)
        certain = self._certain()
        if far is None and certain is None and step % EVERY == 0:
            self.good_step = step
        return far or certain or self._chance()

    def distance(self) -> float:
        """Mean squared difference between the student's and the teacher's samples from the same 16 x_t, in latents."""
        if self._parts is None:
            self._parts = self._drawn()
        errors = []
        with torch.no_grad():
            for samples, target in self._parts:
                batch = samples.batch
                moved = self._setup.student.move(
                    samples.noisy, batch.timesteps, batch.prev_timesteps, batch.conditioning
                )
                errors.append((moved.float() - target.float()).square().mean())
        return float(torch.stack(errors).mean())

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered between two updates."""
        return {
            "good_step": self.good_step,
            "accuracy": list(self._accuracy),
            "updates": self._updates,
            "at_chance": self._at_chance,
            "first_distance": self._first_distance,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.good_step, self._accuracy = state["good_step"], list(state["accuracy"])
        self._updates, self._at_chance = state["updates"], state["at_chance"]
        self._first_distance = state["first_distance"]

    def _far(self, step: int, numbers: dict[str, float]) -> Trouble | None:
        if step % EVERY or not self._first_distance or self._setup.phase.matches_distributions:
            return None
        now = numbers["distance_to_teacher"] = self.distance()
        times = now / self._first_distance
        if not self._runtime.largest(int(not times <= FAR)):
            return None
        text = (
            f"the student's distance to the teacher on {SAMPLES} fixed samples is {times:.1f} times what it was at the "
            f"phase's start"
        )
        return Trouble("far", text, True)

    def _certain(self) -> Trouble | None:
        if self._updates < HORIZON or min(self._accuracy) < CERTAIN:
            return None
        text = (
            f"the discriminator was right about {min(self._accuracy):.1%} of the samples of the last updates"
        )
        return Trouble("certain", text, True)

    def _chance(self) -> Trouble | None:
        if self._at_chance < LONG:
            return None
        text = (
            f"the discriminator has been at chance for {self._at_chance} updates: the student equals the teacher, or the "
            f"discriminator learned nothing or broke at too high a learning rate"
        )
        return Trouble("at chance", text, False)

    def _drawn(self) -> list[tuple[Samples, torch.Tensor]]:
        """The fixed samples in parts, and the teacher's samples of each."""
        setup, device = self._setup, self._runtime.device
        parts = []
        for first in range(0, SAMPLES, _ROWS):
            batch = draw_batch(
                setup.cache,
                list(range(first, first + _ROWS)),
                noise_path=setup.student.noise_path,
                student_steps=setup.rung.student_steps,
                node_steps=setup.rung.node_steps or setup.rung.student_steps,
                teacher_steps=setup.teacher_steps,
                seed=setup.seed,
                keys=(*setup.keys, "guard"),
                group=SAMPLES,
                dtype=self._runtime.weight_dtype,
            )
            samples = Samples(batch.to(device), student=setup.student, teacher=setup.teacher)
            with torch.no_grad():
                parts.append((samples, samples.teacher_sample))
        return parts
