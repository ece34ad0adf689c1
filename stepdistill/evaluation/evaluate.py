"""Draws and measures every row of the evaluation table; writes evaluation/results.json, which the report reads."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import read_sealed, sha256_json, warn_of_damage, write_sealed, write_text
from stepdistill.disk.places import clear_half_written
from stepdistill.evaluation.draw.cost import measure_cost
from stepdistill.evaluation.draw.row_images import RowImages
from stepdistill.evaluation.draw.rows import Row, rows_of
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.evaluation.draw.studies import Studies
from stepdistill.evaluation.evaluation_set import EvaluationSet, RealImages, Renderings, evaluation_set_of
from stepdistill.evaluation.measure.choice import Choice, choose_features
from stepdistill.evaluation.measure.features import clip_score, nearest_prompts, pick_score
from stepdistill.evaluation.measure.image_sets import Distances, ImageSet, View
from stepdistill.evaluation.measure.metrics import BY_EXPERT, described, latent_mse
from stepdistill.evaluation.measure.outside_scorer import run_score_cmd
from stepdistill.evaluation.protocol import IN_WORDS, absent_columns, protocol_of, warnings_of
from stepdistill.export.exported import read_scheduler
from stepdistill.images.drift import image_drift
from stepdistill.jackknife import standard_error
from stepdistill.rng import derive_seed
from stepdistill.run.rungs import require_rung, rung_folder
from stepdistill.runtime import Processes
from stepdistill.teacher.experts import is_of
from stepdistill.teacher.small_base import base_record

logger = logging.getLogger(__name__)

_SCORE_TIMEOUT = 24 * 3600.0


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Draws the missing images, measures all rows, writes evaluation/results.json and returns its content.

    Under torchrun all processes draw; the main process measures, the others return {}. ValueError, before anything is
    drawn, if a rung is not finished or a file that the config names cannot be used.
    """
    rows = rows_of(config)
    for row in rows:
        if row.student_steps is not None:
            require_rung(config.run_dir, row.student_steps)
            read_scheduler(rung_folder(config.run_dir, row.student_steps))
            _require_onnx(config, row)
    evaluation_set, processes = evaluation_set_of(config), Processes()
    choice = choose_features(config, evaluation_set)
    distances = Distances(choice.options(config), device=processes.device)
    drawing = _Drawing(config, rows, evaluation_set, Sampler(config, device=processes.device), processes)
    drawn = drawing.draw()
    if not processes.is_main:
        return {}
    learned: dict[str, object] = {}
    if choice.learns:
        options, learned = choice.learned(config)
        distances = Distances(options, device=processes.device)
    return _Measuring(drawing, drawn, distances).measure(choice, learned)


def _require_onnx(config: RunConfig, row: Row) -> None:
    """ConfigError if a row is to be drawn with a U-Net that was not exported."""
    file = row.weights(config.run_dir)
    if row.onnx is not None and file is not None and not file.is_file():
        quantize = " --quantize int8" if row.onnx == "int8" else ""
        raise ConfigError(
            f"evaluation.onnx: got {row.onnx}, but there is no {file}; fix: `stepdistill export` with --format "
            f"onnx{quantize}"
        )


@dataclass(frozen=True)
class _Drawn:
    """What drawing returns for the measurements, besides the images on disk.

    manifests       by row name: the key of the row's images, and seconds per image
    diversity_grid  prompts, number of seeds and rows of the seed study; None if the study is off
    scale_sweep     every student's LoRA at several weights; None if the study is off
    matrix          every student's LoRA at every student's step count; None if the study is off
    """

    manifests: Mapping[str, Mapping[str, Any]]
    diversity_grid: dict[str, Any] | None
    scale_sweep: dict[str, Any] | None
    matrix: dict[str, Any] | None


@dataclass(frozen=True)
class _Drawing:
    """Draws the images of every row; all processes share the work."""

    config: RunConfig
    rows: Sequence[Row]
    evaluation_set: EvaluationSet
    sampler: Sampler
    processes: Processes

    @property
    def folder(self) -> Path:
        """The run's evaluation/ folder."""
        return self.config.run_dir / "evaluation"

    @property
    def seed(self) -> int:
        """The seed of the rows' noise."""
        return derive_seed(self.config.seed, "evaluation")

    @functools.cached_property
    def studies(self) -> Studies:
        """The small studies beside the table."""
        return Studies(self.config, self.sampler, self.processes, self.evaluation_set.prompts, self.folder)

    def draw(self) -> _Drawn:
        """Draws all images that are missing."""
        reference = self.rows[0]
        manifests = {row.name: self._ensure(row, self.folder / row.name, self.seed) for row in self.rows}
        if self.config.evaluation.floor:
            other = derive_seed(self.config.seed, "evaluation, other seeds")
            self._ensure(reference, self.folder / "floor", other)
        distilled = [row for row in self.rows if row.kind != "teacher"]
        students = [row for row in self.rows if row.kind == "student"]
        return _Drawn(
            manifests,
            diversity_grid=self.studies.draw_seeds([reference, *distilled]),
            scale_sweep=self.studies.scale_sweep(students, reference),
            matrix=self.studies.matrix(students, reference),
        )

    def _ensure(self, row: Row, folder: Path, seed: int) -> dict[str, Any]:
        prompts = self.evaluation_set.prompts
        made = self.sampler.ensure(row, folder, prompts, seed=seed, processes=self.processes)
        if self.processes.is_main:
            logger.info("%d images of %s are in %s", len(prompts), row.name, folder)
        return made


class _Measuring:
    """Measures the drawn images, in the main process."""

    def __init__(self, drawing: _Drawing, drawn: _Drawn, distances: Distances) -> None:
        self._drawing, self._drawn, self._distances = drawing, drawn, distances
        self._config, self._options, self._evaluation_set = (
            drawing.config,
            drawing.config.evaluation,
            drawing.evaluation_set,
        )
        self._rows, self._folder = drawing.rows, drawing.folder

    def measure(self, choice: Choice, learned: Mapping[str, Any]) -> dict[str, Any]:
        """The content of results.json, which is written after each row, so that an interruption keeps the measured rows.

        choice: the extractor that FID is measured with. learned: how a trained extractor was trained, for the protocol.
        """
        config, evaluation_set, distances = self._config, self._evaluation_set, self._distances
        device = str(self._drawing.processes.device)
        real = self._real_set("real", self._evaluation_set.real)
        facts = {
            "num_images": self._options.num_images,
            "reference": self._rows[0].name,
            "prompts": list(self._evaluation_set.prompts[: self._options.grid_columns]),
            "protocol": protocol_of(
                config, evaluation_set, distances, seed=self._drawing.seed, device=device, learned=learned
            ),
            "floor": self._measure_floor(real),
            "other_noise": self._measure_other_noise(),
            "warnings": warnings_of(config, evaluation_set, choice, distances),
            "absent": absent_columns(config, evaluation_set, choice),
            "pictures": {row.name: self._drawn.manifests[row.name]["key"] for row in self._rows},
        }
        if config.shrink is not None:
            facts["smaller_base"] = base_record(config)
        rows: list[dict[str, Any]] = []
        is_complete = self._has_results(facts)
        for row in self._rows:
            rows.append(self._measure_row(row, real))
            if not is_complete:
                left = [r.name for r in self._rows[len(rows) :]]
                self._write(facts, rows, unmeasured=left or ["diversity"])
        grid = self._drawn.diversity_grid
        if grid is not None and distances.main is not None:
            spread = {name: self._spread(name, distances.main) for name in grid["rows"]}
            for measured in rows:
                if measured["row"] in spread:
                    measured["diversity"] = spread[measured["row"]] / max(spread[self._rows[0].name], 1e-12)
        return self._write(facts, rows, unmeasured=[])

    def _has_results(self, facts: Mapping[str, Any]) -> bool:
        """Whether results.json holds every row for these images and this protocol: then it is not overwritten row by row."""
        stored = read_sealed(self._folder / "results.json") or {}

        def digest(results: Mapping[str, Any]) -> str:
            protocol = {k: v for k, v in results["protocol"].items() if k not in IN_WORDS}
            return sha256_json([protocol, results["pictures"]])

        return stored.get("unmeasured") == [] and "pictures" in stored and digest(stored) == digest(facts)

    def _write(
        self, facts: dict[str, Any], measured: Sequence[dict[str, Any]], *, unmeasured: list[str]
    ) -> dict[str, Any]:
        """Writes results.json with the rows measured so far; `unmeasured` names what is still to be measured."""
        first = measured[0]["seconds_per_image"]
        rows = [row | {"speed_up": first / row["seconds_per_image"]} for row in measured]
        replicates = {
            row["row"]: {
                key: values
                for key, values in row.pop("replicates").items()
                if all(map(math.isfinite, values))
            }
            for row in rows
        }
        results = {
            **facts,
            "unmeasured": unmeasured,
            "metrics": described(key for row in rows for key in row),
            "rows": rows,
            "replicates": replicates,
            "diversity_grid": self._drawn.diversity_grid,
            "scale_sweep": self._drawn.scale_sweep,
            "matrix": self._drawn.matrix,
        }
        write_sealed(self._folder / "results.json", results)
        clear_half_written(self._folder)
        return results

    def _measure_row(self, row: Row, real: ImageSet | None) -> dict[str, Any]:
        count, teachers, distances = self._options.num_images, self._teacher_images, self._distances
        row_images = RowImages(self._folder / row.name)
        images, teacher = self._drawn_set(row_images), self._drawn_set(teachers)
        measures: dict[str, Any] = {
            "row": row.name,
            "kind": row.kind,
            "steps": row.steps,
            "nfe": row.nfe,
            "guidance_scale": row.guidance_scale,
            "distilled": row.kind != "teacher",
            **distances.to_real(images, real),
            **self._to_teacher(images),
            **distances.paired_to_teacher(images, teacher),
            "latent_mse_to_teacher": latent_mse(row_images.latents(), teachers.latents()),
            **image_drift(row_images.batches(count), teachers.batches(count)),
            "replicates": self._replicates(images, real),
            "seconds_per_image": self._drawn.manifests[row.name]["seconds_per_image"],
        }
        if self._evaluation_set.world is not None:
            accuracy = self._evaluation_set.world.accuracy(
                row_images.batches(count), self._evaluation_set.prompts
            )
            measures["prompt_accuracy"] = accuracy
        measures |= self._with_prompts(row_images, images)
        if self._options.score_cmd is not None:
            measures |= self._outside(row)
        if self._options.cost_batch_sizes:
            measures["cost"] = self._cost(row)
            # the cost is measured undisturbed; the times of drawing may include other load on the machine
            measures["seconds_per_image"] = 1 / measures["cost"].get(
                "images_per_second", 1 / measures["seconds_per_image"]
            )
        for key, values in measures["replicates"].items():
            measures[f"{key}_std"] = standard_error(values)
        logger.info("measured %s", row.name)
        return measures

    def _with_prompts(self, row_images: RowImages, images: ImageSet) -> dict[str, float]:
        """What CLIP and PickScore say of images and prompts, and whether images are read as the teacher's are."""
        distances, prompts = self._distances, self._evaluation_set.prompts
        measures: dict[str, float] = {}
        if distances.clip is not None:
            batches = row_images.batches(self._options.num_images)
            measures["clip_score"] = clip_score(distances.clip.extractor, batches, prompts)
        if distances.pickscore is not None:
            view = distances.pickscore
            measures["pickscore"] = pick_score(view.extractor, view.features(images), prompts)
        if self._teacher_readings is not None:
            pairs = zip(self._readings(images), self._teacher_readings, strict=True)
            measures["agreement"] = sum(ours == theirs for ours, theirs in pairs) / len(
                self._teacher_readings
            )
            measures |= self._by_expert(images)
        return measures

    def _by_expert(self, images: ImageSet) -> dict[str, float]:
        """The share of images that show their prompt, of the prompts of each of several teachers."""
        readings, prompts = self._readings(images), self._evaluation_set.prompts
        measures = {}
        for teacher in self._config.teachers if self._config.shrink is None else ():
            pairs = zip(readings, prompts, strict=True)
            shown = [seen == prompt for seen, prompt in pairs if is_of(teacher, prompt)]
            if shown:
                measures[f"{BY_EXPERT}{teacher.name}"] = sum(shown) / len(shown)
        return measures

    @functools.cached_property
    def _teacher_readings(self) -> list[str] | None:
        """What the teacher's images show; None if nothing here can read images."""
        can_read = self._evaluation_set.world is not None or self._distances.clip is not None
        return self._readings(self._drawn_set(self._teacher_images)) if can_read else None

    def _readings(self, images: ImageSet) -> list[str]:
        """The caption that each image shows: as the world reads it, else the prompt that CLIP finds nearest."""
        if self._evaluation_set.world is not None:
            return self._evaluation_set.world.readings(images.batches())
        clip = self._distances.clip
        assert clip is not None, "only images that can be read are asked for"
        return nearest_prompts(clip.extractor, clip.features(images), self._evaluation_set.prompts)

    def _measure_floor(self, real: ImageSet | None) -> dict[str, float]:
        """The floors: one set of real images against another, and the teacher against itself with other seeds."""
        floor: dict[str, float] = {}
        other = self._real_set("other real", self._evaluation_set.other_real)
        if other is not None and real is not None:
            floor |= self._distances.to_real(other, real)
        if self._options.reference_stats is not None:
            floor.pop("fid_to_real", None)  # there is no second set of these moments
        return floor | self._to_teacher(self._drawn_set(self._teacher_images))

    def _measure_other_noise(self) -> dict[str, float]:
        """The paired measures of the teacher with other seeds against the teacher: their values for a student that keeps
        nothing of the teacher's map from noise to image."""
        if not self._options.floor:
            return {}
        count, again, teachers = self._options.num_images, self._floor_images, self._teacher_images
        drift = image_drift(again.batches(count), teachers.batches(count))
        return {
            **self._distances.paired_to_teacher(self._drawn_set(again), self._drawn_set(teachers)),
            "latent_mse_to_teacher": latent_mse(again.latents(), teachers.latents()),
            "colour_drift": drift["colour_drift"],
        }

    def _to_teacher(self, images: ImageSet) -> dict[str, float]:
        """The `*_to_teacher` metrics, against the teacher's images with other seeds; {} if those are not drawn."""
        if not self._options.floor:
            return {}
        return self._distances.to_teacher(images, self._drawn_set(self._floor_images))

    def _replicates(self, images: ImageSet, real: ImageSet | None) -> dict[str, list[float]]:
        """By metric: FIDs that each leave out one group of images, for the jackknife."""
        references = {"fid_to_real": real}
        if self._options.floor:
            references["fid_to_teacher"] = self._drawn_set(self._floor_images)
        return {
            key: replicates
            for key, reference in references.items()
            if reference is not None
            and (replicates := self._distances.fid_replicates(images, reference)) is not None
        }

    @property
    def _teacher_images(self) -> RowImages:
        return RowImages(self._folder / self._rows[0].name)

    @property
    def _floor_images(self) -> RowImages:
        return RowImages(self._folder / "floor")

    def _cost(self, row: Row) -> dict[str, Any]:
        path, sizes = self._folder / row.name / "cost.json", list(self._options.cost_batch_sizes)
        key = sha256_json(
            [self._drawn.manifests[row.name]["key"], sizes, str(self._drawing.processes.device)]
        )
        stored = read_sealed(path)
        if stored is None and path.exists():
            warn_of_damage(path, "the cost is measured again")
        if stored is None or stored.get("key") != key or not isinstance(stored.get("cost"), dict):
            cost = measure_cost(
                self._drawing.sampler,
                row,
                self._evaluation_set.prompts,
                batch_sizes=sizes,
                device=self._drawing.processes.device,
            )
            stored = {"key": key, "cost": cost}
            write_sealed(path, stored)
        return stored["cost"]

    def _outside(self, row: Row) -> dict[str, float]:
        prompts = self._folder / row.name / "prompts.txt"
        write_text(prompts, "".join(f"{' '.join(p.split())}\n" for p in self._evaluation_set.prompts))
        scores = run_score_cmd(
            self._options.score_cmd or "",
            images=self._folder / row.name / "images",
            prompts=prompts,
            timeout=_SCORE_TIMEOUT,
        )
        return {f"score_{name}": value for name, value in scores.items()}

    def _spread(self, name: str, view: View) -> float:
        row = next(row for row in self._rows if row.name == name)
        return self._drawing.studies.seed_diversity(
            row, self._drawn.diversity_grid or {}, view.extractor, resize=view.resize
        )

    def _drawn_set(self, row_images: RowImages) -> ImageSet:
        count = self._options.num_images
        return ImageSet(str(row_images.key), row_images.path / "features", lambda: row_images.batches(count))

    def _real_set(self, name: str, images: RealImages | None) -> ImageSet | None:
        if images is None:
            return None
        folder = self._folder / "features" / name.replace(" ", "-")
        return ImageSet(images.key, folder, images.batches, by_prompt=isinstance(images, Renderings))
