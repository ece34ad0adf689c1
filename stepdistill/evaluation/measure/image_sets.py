"""Distances between sets of images: features are computed once per set and cached by a hash; every metric uses them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.config import ConfigError, Evaluation
from stepdistill.disk.durable import sha256_json
from stepdistill.evaluation.measure.distances import (
    Moments,
    cmmd,
    density_coverage,
    fid,
    fid_without_each_group,
    kid,
    precision_recall,
    relations_kept,
)
from stepdistill.evaluation.measure.features import FeatureExtractor, build_extractor, extract_features
from stepdistill.evaluation.measure.kept_features import read_features, write_features
from stepdistill.messages import first_line


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    key        identifies the images
    cache      folder for their features
    batches    returns a new iterator over the images at each call
    by_prompt  whether image k belongs to prompt k of the table
    """

    key: str
    cache: Path
    batches: Callable[[], Iterator[torch.Tensor]]
    by_prompt: bool = True


@dataclass(frozen=True)
class View:
    """How images become features: centre crop of `crop` pixels (None: no crop), resize protocol, extractor."""

    name: str
    extractor: FeatureExtractor
    resize: str
    crop: int | None = None

    def features(self, images: ImageSet) -> torch.Tensor:
        """Features (N, D), float32; read from the cache if images, extractor, resize and crop are the same."""
        key = sha256_json([images.key, self.extractor.sha256, self.resize, self.crop])
        path = images.cache / f"{self.name}.safetensors"
        features = read_features(path, key)
        if features is None:
            features = extract_features(images.batches(), self.extractor, resize=self.resize, crop=self.crop)
            write_features(path, features, key)
        return features


class Distances:
    """Computes every distance that the config asks for.

    Args:
        options: the evaluation section, with `features` set by choice.py. If that is None, there is no main view, and so no
            FID, KID, precision, recall, density or coverage.
        device: device of the extractors.
    """

    def __init__(self, options: Evaluation, *, device: torch.device | str = "cpu") -> None:
        path = options.reference_stats
        self._stats = None if path is None else Moments.from_npz(Path(path))
        self.main: View | None = None
        self._views: list[View] = []
        if options.features is not None:
            self.main = _main_view(options, build_extractor(options.features, device=device))
            self._views.append(self.main)
            self._check_moments(options, self.main.extractor)
            if options.patch_size is not None:
                self._views.append(View("patch", self.main.extractor, "none", options.patch_size))
        self.clip = None
        if options.clip is not None:
            clip = build_extractor(f"clip:{options.clip}", device=device, key="evaluation.clip")
            self.clip = View("clip", clip, "pil_bicubic")
            self._views.append(self.clip)
        self.pickscore = None
        if options.pickscore is not None:
            picked = build_extractor(f"clip:{options.pickscore}", device=device, key="evaluation.pickscore")
            self.pickscore = View("pickscore", picked, "pil_bicubic")
        if options.dinov2 is not None:
            dinov2 = build_extractor(f"dinov2:{options.dinov2}", device=device, key="evaluation.dinov2")
            self._views.append(View("dinov2", dinov2, "pil_bicubic"))

    def _check_moments(self, options: Evaluation, extractor: FeatureExtractor) -> None:
        """ValueError if the moments of real images have another number of features than the extractor gives."""
        if self._stats is not None and len(self._stats.mean) != extractor.num_features:
            raise ValueError(
                f"evaluation.reference_stats: got {options.reference_stats!r}, moments of {len(self._stats.mean)} features; "
                f"allowed: {extractor.num_features}, as many as {extractor.name} gives"
            )

    def check_size(self, size: tuple[int, int]) -> None:
        """Tries every extractor on a black image of `size` (height, width); ValueError if one cannot read it."""
        image = torch.zeros(1, 3, *size, dtype=torch.uint8)
        for view in [*self._views, *([self.pickscore] if self.pickscore is not None else [])]:
            try:
                features = extract_features(iter([image]), view.extractor, resize=view.resize, crop=view.crop)
            except (RuntimeError, TypeError, AttributeError) as error:  # the file holds another network
                raise ValueError(
                    f"evaluation: {view.extractor.name} cannot read an image: {first_line(error)}; fix: another copy of "
                    f"its files"
                ) from None
            if features.shape != (1, view.extractor.num_features) or not bool(features.isfinite().all()):
                raise ValueError(
                    f"evaluation: {view.extractor.name} does not give {view.extractor.num_features} finite features "
                    f"for an image; fix: another copy of its files"
                )

    def to_teacher(self, images: ImageSet, other_seeds: ImageSet) -> dict[str, float]:
        """The `*_to_teacher` metrics: `images` against the teacher's images of the same prompts with other seeds.

        The reference shares no noise with any row. So methods that keep the teacher's map from noise to image have no
        advantage over methods that add noise while sampling. The teacher's own images give the floor.
        """
        return self._pairwise(images, other_seeds, "teacher")

    def paired_to_teacher(self, images: ImageSet, same_noise: ImageSet) -> dict[str, float]:
        """`paired_fid_to_teacher` and `relations_kept`: `images` against the teacher's of the same prompts and noise; {}
        without a main view.

        It measures how well a student keeps the teacher's map from noise to image: 0 for the teacher itself. Images drawn
        with other noise, even the teacher's, are as far away as the floor of `fid_to_teacher`.
        """
        if self.main is None:
            return {}
        theirs, ours = self.main.features(same_noise), self.main.features(images)
        kept = relations_kept(ours, theirs)
        return {"paired_fid_to_teacher": fid(theirs, ours)} | (
            {} if kept is None else {"relations_kept": kept}
        )

    def fid_replicates(self, images: ImageSet, reference: ImageSet) -> list[float] | None:
        """`fid_without_each_group` on the main view's features, for the standard errors of FIDs and of their differences.

        None without a main view.
        """
        if self.main is None:
            return None
        return fid_without_each_group(self.main.features(images), self.main.features(reference))

    def to_real(self, images: ImageSet, real: ImageSet | None) -> dict[str, float]:
        """The `*_to_real` metrics, precision, recall, density and coverage; {} if there is nothing to compare with.

        FID uses evaluation.reference_stats if that is set; without `real` it is then the only metric.
        """
        measures: dict[str, float] = {}
        if real is not None:
            measures = self._pairwise(images, real, "real")
        if real is not None and self.main is not None:
            mine, theirs = self.main.features(images), self.main.features(real)
            measures["precision"], measures["recall"] = precision_recall(theirs, mine)
            measures["density"], measures["coverage"] = density_coverage(theirs, mine)
        if self._stats is not None and self.main is not None:
            measures["fid_to_real"] = fid(self._stats, self.main.features(images))
        return measures

    def _pairwise(self, images: ImageSet, reference: ImageSet, whom: str) -> dict[str, float]:
        measures: dict[str, float] = {}
        for view in self._views:
            mine, theirs = view.features(images), view.features(reference)
            if view.name == "clip":
                measures[f"cmmd_to_{whom}"] = cmmd(theirs, mine)
                continue
            prefix = {"main": "fid", "patch": "patch_fid", "dinov2": "fd_dinov2"}[view.name]
            measures[f"{prefix}_to_{whom}"] = fid(theirs, mine)
            if view.name == "main":
                paired = images.by_prompt and reference.by_prompt
                mean, deviation = kid(theirs, mine, paired=paired, gamma=view.extractor.kid_gamma)
                measures |= {f"kid_to_{whom}": mean, f"kid_to_{whom}_std": deviation}
        return measures


def _main_view(options: Evaluation, extractor: FeatureExtractor) -> View:
    """The view for FID; ConfigError if the extractor needs a resize and has none, or patch_size is not its input size."""
    protocol = options.resize or extractor.default_resize
    if protocol == "none" and extractor.default_resize != "none":
        raise ConfigError(
            f"evaluation.resize: got none; {extractor.name} takes images of {extractor.input_size} pixels; "
            f"allowed: torchmetrics, tf1, pil_bicubic, lanczos512"
        )
    if options.patch_size is not None and options.patch_size != extractor.input_size:
        raise ConfigError(
            f"evaluation.patch_size: got {options.patch_size}; allowed: {extractor.input_size}, the side that "
            f"{extractor.name} takes without resize"
        )
    return View("main", extractor, protocol)
