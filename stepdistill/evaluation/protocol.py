"""What accompanies an evaluation table: its protocol, its warnings, and the columns that are missing, with the reasons."""

from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.config import Evaluation, RunConfig
from stepdistill.disk.durable import sha256_json
from stepdistill.evaluation.evaluation_set import EvaluationSet
from stepdistill.evaluation.measure.choice import Choice
from stepdistill.evaluation.measure.image_sets import Distances
from stepdistill.runtime import source_commit

FEW_IMAGES = 5000
_IMAGE_METRICS = "precision, recall, density, coverage"


IN_WORDS = ("prompts", "real_images", "other_real_images", "evaluated_at_commit")
"""Parts of a protocol that another version of the package may say differently. Hashes beside them identify the data."""


def protocol_of(
    config: RunConfig,
    evaluation_set: EvaluationSet,
    distances: Distances,
    *,
    seed: int,
    device: str,
    learned: Mapping[str, Any],
) -> dict[str, Any]:
    """The protocol of a table: two tables can be compared only if their protocols agree.

    learned: how an extractor was trained on the run's training images (trained.py); empty for any other extractor.
    """
    options, main, real = config.evaluation, distances.main, evaluation_set.real
    return {
        "teacher_images": "other seeds" if options.floor else "none",
        "prompts": evaluation_set.prompts_about,
        "prompts_sha256": sha256_json(list(evaluation_set.prompts)),
        "num_images": options.num_images,
        "seed": seed,
        "feature_extractor": main.extractor.name if main is not None else "none",
        "feature_extractor_sha256": main.extractor.sha256 if main is not None else None,
        **({"feature_extractor_learned": dict(learned)} if learned else {}),
        "feature_dimension": main.extractor.num_features if main is not None else None,
        "resize": main.resize if main is not None else None,
        "patch_size": options.patch_size,
        "real_images": real.about if real is not None else options.reference_stats or "none",
        "real_images_key": real.key if real is not None else None,
        "other_real_images": evaluation_set.other_real.about
        if evaluation_set.other_real is not None
        else None,
        "dtype": options.dtype,
        "device": device,
        "batch_size": options.batch_size,
        "config_sha256": sha256_json(config.model_dump(mode="json")),
        "evaluated_at_commit": source_commit(),
    }


def warnings_of(
    config: RunConfig, evaluation_set: EvaluationSet, choice: Choice, distances: Distances
) -> list[str]:
    """The warnings that are printed above the table."""
    count = config.evaluation.num_images
    floors = [
        name
        for name, is_measured in (("real", evaluation_set.other_real), ("teacher", config.evaluation.floor))
        if is_measured
    ]
    with_floor = f"its floor (to {' and '.join(floors)}) and with " if floors else ""
    few = (
        f"{count} images: below {FEW_IMAGES:,} a Frechet distance is mostly bias; compare it with {with_floor}other rows of "
        f"this table, not with published numbers"
    )
    warnings = [
        *choice.warnings,
        *evaluation_set.warnings,
        *([few] if count < FEW_IMAGES and choice.spec else []),
    ]
    return [*warnings, *real_warnings(config.evaluation, evaluation_set, distances)]


def real_warnings(options: Evaluation, evaluation_set: EvaluationSet, distances: Distances) -> list[str]:
    """Warnings about FID and KID to real: too few real images, or no second set of real images to measure the floor with."""
    if evaluation_set.real is None or distances.main is None:
        return []
    warnings, dimension = [], distances.main.extractor.num_features
    if len(evaluation_set.real) <= dimension and options.reference_stats is None:
        warnings.append(
            f"{len(evaluation_set.real):,} real images for {dimension:,} features: so few images do not determine the "
            f"covariance that FID uses; trust only large differences between rows, or KID to real, which is unbiased"
        )
    if evaluation_set.other_real is None:
        warnings.append("FID and KID to real have no floor: there is no second set of real images")
    return warnings


def absent_columns(config: RunConfig, evaluation_set: EvaluationSet, choice: Choice) -> list[dict[str, str]]:
    """The groups of columns that the table lacks, each with the reason."""
    return [{"columns": columns, "why": why} for columns, why in _absent(config, evaluation_set, choice)]


def _absent(config: RunConfig, evaluation_set: EvaluationSet, choice: Choice) -> Iterator[tuple[str, str]]:
    options = config.evaluation
    if choice.spec is None:
        yield (
            f"FID, KID, {_IMAGE_METRICS}, diversity",
            f"{choice.why}; set evaluation.features to an extractor",
        )
    elif evaluation_set.real is None and options.reference_stats is None:
        why = "there are no real images of these prompts; set evaluation.real_images to a folder of them"
        yield f"FID and KID to real, {_IMAGE_METRICS}", why
    elif evaluation_set.real is None:
        yield (
            f"KID to real, {_IMAGE_METRICS}",
            "evaluation.reference_stats holds moments only, and these metrics need images",
        )
    if choice.spec is not None and not options.floor:
        yield "FID and KID to teacher", "evaluation.floor is false: no images with other seeds were drawn"
    if options.patch_size is None:
        yield "patch FID", "evaluation.patch_size is not set"
    if options.clip is None:
        yield "CLIP score, CMMD", "evaluation.clip is not set to a CLIP folder"
    if options.pickscore is None:
        yield "PickScore", "evaluation.pickscore is not set to the folder of PickScore's model"
    if options.dinov2 is None:
        yield "FD-DINOv2", "evaluation.dinov2 is not set to a DINOv2 folder"
    if evaluation_set.world is None:
        yield "prompt accuracy", "it can be measured for prompts of the demo's worlds only"
    if choice.spec is not None and not options.diversity_prompts:
        yield "diversity", "evaluation.diversity_prompts is 0"
