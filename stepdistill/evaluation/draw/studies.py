"""Small studies besides the table, each with its own folder of images.

seeds    a few prompts with several seeds each: are the student's images as diverse as the teacher's?
scales   every student's LoRA at several weights
matrix   every student's LoRA sampled at the step count of every student
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import RunConfig
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import Row
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.evaluation.measure.distances import diversity
from stepdistill.evaluation.measure.features import FeatureExtractor, extract_features
from stepdistill.evaluation.measure.metrics import latent_mse
from stepdistill.rng import derive_seed
from stepdistill.runtime import Processes


class Studies:
    """The studies of one run.

    Args:
        config: the run's config.
        sampler: draws the images.
        processes: the processes that share the drawing.
        prompts: the prompts of the table's images.
        folder: the run's evaluation/ folder.
    """

    def __init__(
        self, config: RunConfig, sampler: Sampler, processes: Processes, prompts: Sequence[str], folder: Path
    ) -> None:
        self._config, self._sampler, self._processes = config, sampler, processes
        self._prompts, self._folder = prompts, folder
        self._seed = derive_seed(config.seed, "studies")

    def draw_seeds(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """Draws the seed study of these rows; image number prompt * seeds + seed.

        Returns the prompts, the number of seeds and the row names; None if evaluation.diversity_prompts is 0.
        """
        options = self._config.evaluation
        if not options.diversity_prompts:
            return None
        chosen = list(dict.fromkeys(self._prompts))[: options.diversity_prompts]
        repeated = [prompt for prompt in chosen for _ in range(options.diversity_seeds)]
        for row in rows:
            self._ensure(row, self._seeds_folder(row), repeated)
        names = [row.name for row in rows]
        return {"prompts": chosen, "seeds": options.diversity_seeds, "rows": names}

    def seed_diversity(
        self, row: Row, grid: dict[str, Any], extractor: FeatureExtractor, *, resize: str
    ) -> float:
        """Mean feature distance between two images of one prompt with different seeds, of a drawn seed study."""
        prompts, seeds = len(grid["prompts"]), grid["seeds"]
        batches = RowImages(self._seeds_folder(row)).batches(prompts * seeds)
        return diversity(extract_features(batches, extractor, resize=resize).reshape(prompts, seeds, -1))

    def scale_sweep(self, students: Sequence[Row], reference: Row) -> dict[str, Any] | None:
        """Each student's LoRA at each weight, with the latent MSE to the teacher; None without evaluation.lora_scales."""
        scales, count = self._config.evaluation.lora_scales, self._config.evaluation.study_images
        if not scales:
            return None
        cells = [
            {"row": row.name, "scale": scale}
            | self._against(reference, replace(row, lora_scale=scale), f"scales/{row.name}@{scale:g}", count)
            for row in students
            for scale in scales
        ]
        return {"scales": list(scales), "images": count, "cells": cells}

    def matrix(self, students: Sequence[Row], reference: Row) -> dict[str, Any] | None:
        """Each student's LoRA at each student's step count, with the latent MSE to the teacher; None if evaluation.matrix is
        off."""
        count = self._config.evaluation.study_images
        if not self._config.evaluation.matrix:
            return None
        cells = [
            {"adapter": row.steps, "steps": other.steps}
            | self._against(
                reference, replace(row, steps=other.steps), f"matrix/{row.steps}@{other.steps}", count
            )
            for row in students
            for other in students
        ]
        return {"images": count, "cells": cells}

    def _against(self, reference: Row, row: Row, folder: str, count: int) -> dict[str, float]:
        prompts = self._prompts[:count]
        teacher = self._folder / "studies" / reference.name
        self._ensure(reference, teacher, prompts)
        self._ensure(row, self._folder / folder, prompts)
        if not self._processes.is_main:
            return {}
        distance = latent_mse(self._latents(self._folder / folder), self._latents(teacher))
        return {"latent_mse_to_teacher": distance}

    def _latents(self, folder: Path) -> torch.Tensor:
        return RowImages(folder).latents()

    def _seeds_folder(self, row: Row) -> Path:
        return self._folder / "seeds" / row.name

    def _ensure(self, row: Row, folder: Path, prompts: Sequence[str]) -> None:
        self._sampler.ensure(row, folder, prompts, seed=self._seed, processes=self._processes)
