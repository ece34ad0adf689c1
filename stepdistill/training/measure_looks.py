"""Measures which phase changed sharpness, contrast or colour, on a few images at its end; saved beside its preview.

The captions come from the cache. The undistilled, guided teacher draws from the same noise, once for all phases, so the
change by a phase is its numbers minus those of the previous phase.
"""

import hashlib
from pathlib import Path
from typing import Any

from stepdistill import rng
from stepdistill.data.cache import LatentCache
from stepdistill.disk.durable import write_sealed
from stepdistill.images.drift import Looks, colour_distances, looks_drift, looks_of
from stepdistill.models.denoiser import Denoiser
from stepdistill.training.painter import Painter, decode_latents


class PhaseLooks:
    """Compares the student's images with the undistilled teacher's images from the same noise and captions.

    Args:
        painter: draws the images.
        cache: gives the captions and the data's own images, from samples of its commonest size.
        teacher: the undistilled, guided teacher.
        teacher_steps: steps of the teacher's sampler.
        images: number of images; 0 measures nothing.
        seed: chooses captions and noise.
    """

    def __init__(
        self,
        painter: Painter,
        cache: LatentCache,
        teacher: Denoiser,
        *,
        teacher_steps: int,
        images: int,
        seed: int,
    ) -> None:
        self._painter, self._base, self._base_steps = painter, teacher, teacher_steps
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
        self._reference: tuple[Looks, Looks] | None = None  # of the teacher's images, of the data's own

    def write(self, path: Path, student: Denoiser, *, steps: int) -> None:
        """Writes the student's drift in sharpness, contrast and colour as JSON: means, and values per image."""
        if not self._count:
            return
        if self._reference is None:
            self._reference = self._draw(self._base, self._base_steps), self._of_data()
        teacher, data = self._reference
        drawn = self._draw(student, steps)
        about: dict[str, Any] = {"images": self._count, "seed": self._seed, "samples": self._digest}
        about |= {"teacher_steps": self._base_steps, "guidance_scale": self._base.guidance_scale}
        per_image = {"student": _lists(drawn, teacher), "teacher": _lists(teacher, teacher)}
        write_sealed(
            path,
            {
                "compared_with": about,
                "student_steps": steps,
                **looks_drift(drawn, teacher),
                "data": looks_drift(data, teacher),
                "per_image": per_image | {"data": _lists(data, teacher)},
            },
        )

    def _draw(self, denoiser: Denoiser, steps: int) -> Looks:
        return looks_of([self._painter.draw(denoiser, self._noise, self._samples.conditioning, steps=steps)])

    def _of_data(self) -> Looks:
        device = self._base.network.device
        return looks_of([decode_latents(self._painter.vae, self._samples.latents.to(device))])


def _lists(looks: Looks, teacher: Looks) -> dict[str, list[float]]:
    """Per image: sharpness, contrast, and the distance of its colours from those of the teacher's image."""
    return {
        "sharpness": looks.sharpness.tolist(),
        "contrast": looks.contrast.tolist(),
        "colour": colour_distances(looks, teacher).tolist(),
    }
