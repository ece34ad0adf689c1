"""One phase of one rung, ready to run: its settings, networks and data."""

from collections.abc import Callable
from dataclasses import dataclass

from stepdistill import rng
from stepdistill.config import Phase, Rung, Training
from stepdistill.data.cache import LatentCache
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.scores import Scores


@dataclass(frozen=True)
class PhaseSetup:
    """One phase of one rung, ready to run.

    number           the phase's index in the rung
    preview          preview(name, step) writes a preview image after so many updates
    adversary_scale  factor of the discriminator's learning rate, below 1 after the guard went back
    name             in place of the rung's steps in messages
    scores           the scores that distribution matching compares; None if no objective does
    """

    rung: Rung
    phase: Phase
    number: int
    training: Training
    seed: int
    student: Denoiser
    teacher: Denoiser
    discriminator: Discriminator | None
    cache: LatentCache
    preview: Callable[[str, int], None]
    adversary_scale: float = 1.0
    scores: Scores | None = None
    name: str | None = None

    def close(self) -> None:
        """Removes the critics from the network."""
        for critic in (self.discriminator, self.scores):
            if critic is not None:
                critic.close()

    @property
    def keys(self) -> tuple[rng.Key, ...]:
        """Keys that set this phase's random numbers apart from those of others."""
        return (self.rung.student_steps, self.number, self.phase.title)

    @property
    def title(self) -> str:
        """The phase's title in the progress display and in messages, such as "32 -> 8 mse"."""
        if self.name is not None:
            return f"{self.name} {self.phase.title}"
        return f"{self.rung.teacher_steps} -> {self.rung.student_steps} {self.phase.title}"

    @property
    def teacher_steps(self) -> int:
        """Steps of the sampler whose moves the student learns to make in one."""
        return self.phase.teacher_steps or self.rung.teacher_steps
