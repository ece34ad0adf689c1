"""Chooses the feature extractor for FID and related metrics from `evaluation.features`.

Default: its reader for a world of the demo; for other images Inception if its weights are on disk, else a small net trained
on the run's training images if there are enough of them, else none. A reader was trained on its world only, so it measures
other images only if the config names it.
"""

from dataclasses import dataclass

from stepdistill.config import ConfigError, Evaluation, RunConfig
from stepdistill.demo.world import SHIPPED_READERS, world_of
from stepdistill.evaluation.evaluation_set import EvaluationSet
from stepdistill.evaluation.measure.feature_files import inception_file
from stepdistill.evaluation.measure.trained import (
    MIN_NET_IMAGES,
    images_at_hand,
    trained_extractor,
    trained_facts,
    trained_side,
)

TRAINED = "trained"
_OF_OTHERS = (
    "distances use {spec}, which learned from a world of the demo, but these images are not from it, and the reader "
    "overlooks most damage to them; evaluation.features=trained, inception, clip:FOLDER or dinov2:FOLDER detects it"
)


@dataclass(frozen=True)
class Choice:
    """The chosen extractor.

    spec      the argument of build_extractor; "trained" if the net is still to be trained; None if no extractor is available
    why       the reason, if spec is None
    is_named  whether the config names the extractor
    warnings  for the reader of the table
    """

    spec: str | None
    why: str = ""
    is_named: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether the extractor is still to be trained, which happens after the images are drawn."""
        return self.spec == TRAINED

    def options(self, config: RunConfig) -> Evaluation:
        """The evaluation section with the chosen extractor as `features`, or None there if it is still to be trained."""
        return config.evaluation.model_copy(update={"features": None if self.learns else self.spec})

    def learned(self, config: RunConfig) -> tuple[Evaluation, dict[str, object]]:
        """Trains the extractor if needed; returns the evaluation section that names it, and how it was trained, for the
        protocol."""
        folder = trained_extractor(config)
        options = config.evaluation.model_copy(update={"features": f"{TRAINED}:{folder}"})
        return options, trained_facts(folder)


def choose_features(config: RunConfig, evaluation_set: EvaluationSet) -> Choice:
    """The extractor for a config and its evaluation set.

    ConfigError if it is the trained one and that cannot work: too few images, or an unsuitable resize or patch_size.
    """
    spec = config.evaluation.features
    world = world_of(config.data.source) or evaluation_set.world
    if spec is None and world is not None:
        return Choice(world.extractor, is_named=False)
    if spec is not None and spec != TRAINED:
        is_of_others = spec in SHIPPED_READERS and (world is None or world.extractor != spec)
        return Choice(spec, warnings=(_OF_OTHERS.format(spec=spec),) if is_of_others else ())
    if spec is None and inception_file().is_file():
        return Choice("inception", is_named=False)
    count = images_at_hand(config)
    if count >= MIN_NET_IMAGES:
        _check_settings(config)
        return Choice(TRAINED, is_named=spec is not None)
    few = f"only {count} images to learn from, fewer than the {MIN_NET_IMAGES} that it needs"
    if spec == TRAINED:
        raise ConfigError(
            f"evaluation.features: got trained, but there are {few}; allowed: more images as data.source or "
            f"evaluation.real_images, or inception, clip:FOLDER, dinov2:FOLDER"
        )
    why = f"there are no weights of Inception at {inception_file()}, and a net of the run's training images has {few}"
    return Choice(None, why, is_named=False)


def _check_settings(config: RunConfig) -> None:
    options, side = config.evaluation, trained_side(config)
    if options.resize == "none":
        raise ConfigError(
            f"evaluation.resize: got none; the trained extractor takes images of {side} pixels; "
            f"allowed: torchmetrics, tf1, pil_bicubic, lanczos512"
        )
    if options.patch_size not in (None, side):
        raise ConfigError(
            f"evaluation.patch_size: got {options.patch_size}; allowed: {side}, the side that the trained extractor takes"
        )
