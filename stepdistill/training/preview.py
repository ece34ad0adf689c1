"""Preview images during training: the student's samples below the teacher's, at fixed prompts and noise."""

from pathlib import Path

from PIL import Image

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.disk.durable import write_image
from stepdistill.images.image_grid import image_grid
from stepdistill.models.denoiser import Denoiser
from stepdistill.training.painter import Painter, to_images

MAX_TEACHER_STEPS = 32


class Preview:
    """Draws one rung's previews into a folder.

    Args:
        painter: draws the images.
        cache: holds the embeddings of `prompts`.
        prompts: each is one column of the image.
        seed: of the fixed noise.
        folder: where the PNG files go.
    """

    def __init__(
        self, painter: Painter, cache: LatentCache, prompts: list[str], *, seed: int, folder: Path
    ) -> None:
        self._painter, self.folder = painter, folder
        self._conditioning = cache.of_prompts(prompts)
        shape = cache.latent_shapes[cache.commonest_size]
        self._noise = rng.normal(shape, list(range(len(prompts))), seed=seed, keys=("preview",))
        self._teacher_row: tuple[object, list[Image.Image]] | None = None

    def draw(
        self, name: str, student: Denoiser, teacher: Denoiser, *, student_steps: int, teacher_steps: int
    ) -> Path:
        """Writes NAME.png, with the teacher (at most 32 steps) above the student; returns its path."""
        steps = min(teacher_steps, MAX_TEACHER_STEPS)
        if self._teacher_row is None or self._teacher_row[0] != (steps, teacher.adapter):
            images = self._painter.draw(teacher, self._noise, self._conditioning, steps=steps)
            self._teacher_row = ((steps, teacher.adapter), to_images(images))
        images = self._painter.draw(student, self._noise, self._conditioning, steps=student_steps)
        target = self.folder / f"{name}.png"
        rows = {f"teacher {steps}": self._teacher_row[1], f"student {student_steps}": to_images(images)}
        write_image(target, image_grid(rows))
        return target
