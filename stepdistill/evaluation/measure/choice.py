"""Which extractor `evaluation.features` comes to, and why where it comes to none.

Where nothing is named: the reader for the letters world; for other pictures Inception where its weights are on disk, else a
small net that learns from the run's own pictures, where there are enough of them. The reader knows letters alone: other
pictures are measured by it only where it is named.
"""

from dataclasses import dataclass

from stepdistill.config import ConfigError, Evaluation, RunConfig
from stepdistill.demo.world import world_of
from stepdistill.evaluation.evaluation_set import EvaluationSet
from stepdistill.evaluation.measure.feature_files import inception_file
from stepdistill.evaluation.measure.trained import (
    FEWEST_PICTURES,
    pictures_at_hand,
    trained_extractor,
    trained_facts,
    trained_side,
)

TRAINED = "trained"
_OF_LETTERS = (
    "distances are measured by the reader of the letters world, which these pictures are not of: it overlooks most damage "
    "to them; evaluation.features=trained, inception, clip:FOLDER or dinov2:FOLDER sees it"
)


@dataclass(frozen=True)
class Choice:
    """spec: what build_extractor takes, "trained" where it is yet to learn, None where nothing is at hand; why: that, in
    words; is_named: whether the config names it; warnings: what a reader of the table must know."""

    spec: str | None
    why: str = ""
    is_named: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether it is yet to be trained, which is done once the pictures are drawn."""
        return self.spec == TRAINED

    def options(self, config: RunConfig) -> Evaluation:
        """The evaluation section with what can be built before anything is drawn: nothing of what is yet to learn."""
        return config.evaluation.model_copy(update={"features": None if self.learns else self.spec})

    def learned(self, config: RunConfig) -> tuple[Evaluation, dict[str, object]]:
        """The evaluation section with the net that has learned by now, and what the protocol says of that."""
        folder = trained_extractor(config)
        options = config.evaluation.model_copy(update={"features": f"{TRAINED}:{folder}"})
        return options, trained_facts(folder)


def choose_features(config: RunConfig, evaluation_set: EvaluationSet) -> Choice:
    """ConfigError where the net that learns is named or comes next, and cannot: too few pictures, another side or resize."""
    spec = config.evaluation.features
    world = world_of(config.data.source) or evaluation_set.world
    if spec is None and world is not None:
        return Choice(world.extractor, is_named=False)
    if spec is not None and spec != TRAINED:
        return Choice(spec, warnings=(_OF_LETTERS,) if spec == "reader" and world is None else ())
    if spec is None and inception_file().is_file():
        return Choice("inception", is_named=False)
    count = pictures_at_hand(config)
    if count >= FEWEST_PICTURES:
        _check_settings(config)
        return Choice(TRAINED, is_named=spec is not None)
    few = f"{count} pictures to learn from, of {FEWEST_PICTURES} that it takes"
    if spec == TRAINED:
        raise ConfigError(
            f"evaluation.features: got trained, but there are {few}; allowed: more pictures as data.source or "
            f"evaluation.real_images, or inception, clip:FOLDER, dinov2:FOLDER"
        )
    why = f"there are no weights of Inception at {inception_file()}, and a net of the run's own has {few}"
    return Choice(None, why, is_named=False)


def _check_settings(config: RunConfig) -> None:
    options, side = config.evaluation, trained_side(config)
    if options.resize == "none":
        raise ConfigError(
            f"evaluation.resize: got none; the trained extractor wants {side} pixels; "
            f"allowed: torchmetrics, tf1, pil_bicubic, lanczos512"
        )
    if options.patch_size not in (None, side):
        raise ConfigError(
            f"evaluation.patch_size: got {options.patch_size}; allowed: {side}, the side that the trained extractor wants"
        )
