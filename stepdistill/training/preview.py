"""Pictures while training: the student's samples under the teacher's, at fixed prompts and noise."""

from pathlib import Path

from PIL import Image

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.durable import write_picture
from stepdistill.report.grid import image_grid
from stepdistill.training.pictures import Painter, to_images
from stepdistill.training.steps import Denoisers

MOST_TEACHER_STEPS = 32


class Preview:
    """Draws one rung's previews into a folder.

    Args:
        painter: draws.
        cache: holds the embeddings of `prompts`.
        prompts: one column each.
        seed: of the fixed noise.
        folder: where the PNGs go.
    """

    def __init__(
        self, painter: Painter, cache: LatentCache, prompts: list[str], *, seed: int, folder: Path
    ) -> None:
        self._painter, self.folder = painter, folder
        self._conditioning = cache.of_prompts(prompts)
        shape = cache.latent_shapes[cache.commonest_size]
        self._noise = rng.normal(shape, list(range(len(prompts))), seed=seed, keys=("preview",))
        self._teacher_row: tuple[object, list[Image.Image]] | None = None

    def draw(self, name: str, nets: Denoisers, *, teacher_steps: int, student_steps: int) -> Path:
        """Writes NAME.png: teacher above, student below. Few-step samples of 32 steps at most for the teacher."""
        steps = min(teacher_steps, MOST_TEACHER_STEPS)
        if self._teacher_row is None or self._teacher_row[0] != (steps, nets.roles.teacher_is_base):
            pictures = self._painter.of_teacher(nets, self._noise, self._conditioning, steps=steps)
            self._teacher_row = ((steps, nets.roles.teacher_is_base), to_images(pictures))
        pictures = self._painter.of_student(nets, self._noise, self._conditioning, steps=student_steps)
        target = self.folder / f"{name}.png"
        rows = {f"teacher {steps}": self._teacher_row[1], f"student {student_steps}": to_images(pictures)}
        write_picture(target, image_grid(rows))
        return target
