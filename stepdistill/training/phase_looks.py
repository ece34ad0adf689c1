"""Which phase moved sharpness, contrast or colour: a few pictures at each phase's end, in numbers beside its preview.

The captions are the cache's own. At the same noise the undistilled, guided teacher draws once for all phases, so that what a
phase changed is its numbers less those of the phase before.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.durable import write_sealed
from stepdistill.evaluation.drift import Looks, colour_distances, looks_drift, looks_of
from stepdistill.training.pictures import Painter, decode_pictures
from stepdistill.training.steps import Denoisers


@dataclass(frozen=True)
class BaseTeacher:
    """How the undistilled teacher is asked: what it predicts, its guidance and its steps."""

    prediction_type: str
    guidance_scale: float
    steps: int


class PhaseLooks:
    """Measures what the student draws against what the undistilled teacher draws of the same noise and captions.

    Args:
        painter: draws.
        cache: captions, and the data's own pictures; samples of its commonest size.
        teacher: who is compared with.
        images: how many pictures; 0 measures nothing.
        seed: of captions and noise.
    """

    def __init__(
        self, painter: Painter, cache: LatentCache, teacher: BaseTeacher, *, images: int, seed: int
    ) -> None:
        self._painter, self._teacher = painter, teacher
        size = cache.commonest_size
        self._count = min(images, cache.sizes[size])
        if not self._count:
            return
        order = rng.derive_seed(seed, "looks")
        rows = rng.dataset_rows(list(range(self._count)), size=cache.sizes[size], seed=order)
        self._samples = cache.samples(size, rows)
        self._digest = hashlib.sha256(self._samples.latents.numpy().tobytes()).hexdigest()[:16]
        shape = cache.latent_shapes[size]
        self._noise = rng.normal(shape, list(range(self._count)), seed=seed, keys=("looks",))
        self._seed = seed
        self._reference: tuple[Looks, Looks] | None = None  # the teacher's pictures, the data's own

    def write(self, path: Path, nets: Denoisers, *, steps: int) -> None:
        """The student's drift in sharpness, contrast and colour, as means and per image, as JSON."""
        if not self._count:
            return
        if self._reference is None:
            self._reference = self._of_teacher(nets), self._of_data(nets)
        teacher, data = self._reference
        pictures = self._painter.of_student(nets, self._noise, self._samples.conditioning, steps=steps)
        student = looks_of([pictures])
        about: dict[str, Any] = {"images": self._count, "seed": self._seed, "samples": self._digest}
        about |= {"teacher_steps": self._teacher.steps, "guidance_scale": self._teacher.guidance_scale}
        per_image = {"student": _lists(student, teacher), "teacher": _lists(teacher, teacher)}
        write_sealed(
            path,
            {
                "compared_with": about,
                "student_steps": steps,
                **looks_drift(student, teacher),
                "data": looks_drift(data, teacher),
                "per_image": per_image | {"data": _lists(data, teacher)},
            },
        )

    def _of_teacher(self, nets: Denoisers) -> Looks:
        with _undistilled(nets, self._teacher) as base:
            pictures = self._painter.of_teacher(
                base, self._noise, self._samples.conditioning, steps=self._teacher.steps
            )
        return looks_of([pictures])

    def _of_data(self, nets: Denoisers) -> Looks:
        return looks_of(
            [decode_pictures(self._painter.vae, self._samples.latents.to(nets.roles.unet.device))]
        )


@contextmanager
def _undistilled(nets: Denoisers, teacher: BaseTeacher) -> Iterator[Denoisers]:
    """The networks with the bare base as teacher; the rung's teacher is back afterwards."""
    before = nets.roles.teacher_is_base
    nets.roles.teacher_is_base = True
    try:
        yield replace(
            nets,
            teacher_prediction_type=teacher.prediction_type,
            guidance_scale=teacher.guidance_scale,
        )
    finally:
        nets.roles.teacher_is_base = before


def _lists(looks: Looks, teacher: Looks) -> dict[str, list[float]]:
    """Per image: sharpness and contrast, and the distance of its colours to those of the teacher's."""
    return {
        "sharpness": looks.sharpness.tolist(),
        "contrast": looks.contrast.tolist(),
        "colour": colour_distances(looks, teacher).tolist(),
    }
