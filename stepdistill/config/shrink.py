"""The `shrink` section of a config: how a smaller base model is made before the ladder. No torch."""

import re
from typing import Annotated

from pydantic import Field

from stepdistill.config.ladder import PLACES, Phase, Rung, WeightedObjective
from stepdistill.config.ladder_checks import check_objectives
from stepdistill.config.objective_kinds import OBJECTIVES, compares_features, has_critic
from stepdistill.config.section import Affects, ConfigError, LearningRate, PositiveInt, Section

PART_PATTERN = r"^(middle|middle\.end|level\.\d+\.(pair|((encoder|decoder)\.)?layer)\.\d+)$"
Part = Annotated[str, Field(pattern=PART_PATTERN)]
_OBJECTIVES = tuple(
    kind
    for kind, known in OBJECTIVES.items()
    if known.teacher in ("prediction", "features", "nothing") and not has_critic(kind) and kind != "convert"
)
"""Those that need neither the steps of a sampler nor a critic."""


class ShrinkObjective(WeightedObjective, affects=Affects.EVERY_RUNG):
    """One of the objectives with which the smaller base is trained."""


class Shrink(Section, affects=Affects.EVERY_RUNG):
    """A smaller base model: blocks of the teacher's U-Net are removed, and what is left is trained whole to imitate it (as
    BK-SDM was). The ladder then climbs on it, and its first rung learns from the teacher itself."""

    remove: Annotated[tuple[Part, ...], Field(max_length=500)] = ()
    """The parts to remove. level.L.pair.K: at level L (0 has the most pixels) residual block K, with its attention, of
    encoder and decoder; level.L.encoder.layer.K and level.L.decoder.layer.K: transformer block K of the attentions at level
    L, of which one stays in the encoder (at the last level, the mid-block's go with the encoder's); level.L.layer.K: both;
    middle.end: the attention and the second residual block of the mid-block; middle: the whole mid-block."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of `remove`: the share of the parameters that is kept at most. Each part is removed alone and the output's
    error is measured; parts with the least error per parameter are removed first."""
    sensitivity_samples: Annotated[int, Field(gt=0, le=100_000)] = 64
    """Samples of the data on which that error is measured."""
    objectives: Annotated[tuple[ShrinkObjective, ...], Field(min_length=1, max_length=8)] = (
        ShrinkObjective(kind="output"),
        ShrinkObjective(kind="denoise"),
        ShrinkObjective(kind="l2", taps=("encoder", "decoder")),
    )
    """What is minimised, at all timesteps: the difference to the teacher's output, to the noise in the data, and to the
    teacher's features (the three terms of BK-SDM, arXiv 2305.15798). Allowed kinds: output, denoise, l2, attention, gram,
    kernel and relations, at encoder, middle and decoder."""
    max_train_steps: PositiveInt = 2000
    """Number of updates; all weights are trained, with float32 masters, by AdamW unless training.optimizer is adam8bit or
    prodigy."""
    learning_rate: LearningRate = 5e-5
    """Learning rate after warm-up; 5e-5 as in BK-SDM."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the samples that are trained without their prompt, so that the smaller base can be guided too."""

    @property
    def phase(self) -> Phase:
        """The training of the smaller base as a phase."""
        return Phase(
            objectives=self.objectives,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            prompt_dropout=self.prompt_dropout,
        )


def check_shrink(
    shrink: Shrink | None, first: Rung, *, has_teachers: bool, has_start: bool, micro_batch: int
) -> None:
    """ConfigError if the section's keys, or other keys and it, do not go together.

    first: the first rung of the ladder, whose teacher is the original U-Net.
    """
    if shrink is None:
        return
    if bool(shrink.remove) == (shrink.keep is not None):
        given = "both" if shrink.remove else "neither"
        raise ConfigError(
            f"shrink: got {given} of remove and keep; allowed: one of them, shrink.keep=0.6 and shrink.remove=[] or a list "
            f"of parts and shrink.keep=null"
        )
    _check_apart(shrink.remove)
    for place, objective in enumerate(shrink.objectives):
        if objective.kind not in _OBJECTIVES:
            raise ConfigError(
                f"shrink.objectives.{place}.kind: got {objective.kind!r}; allowed: {', '.join(_OBJECTIVES)}"
            )
        named = next((tap for tap in objective.taps if tap not in PLACES), None)
        if named is not None and compares_features(objective.kind):
            raise ConfigError(
                f"shrink.objectives.{place}.taps: got {named!r}, whose number may be another in the smaller U-Net; allowed: "
                f"{', '.join(PLACES)}"
            )
    check_objectives("shrink", shrink.phase)
    if has_teachers or has_start:
        key = "teachers" if has_teachers else "start_from"
        raise ConfigError(
            f"{key}: got a value beside shrink; allowed: none, because what it names was made for the teacher's own U-Net"
        )
    for number, phase in enumerate(first.phases):
        named = next((tap for tap in phase.taps if tap not in PLACES), None)
        if named is not None:
            raise ConfigError(
                f"ladder.0.phases.{number}.objectives: got the tap {named!r}, whose number may be another in the smaller "
                f"U-Net than in its teacher's; allowed beside shrink: {', '.join(PLACES)}"
            )
    relates = [of.between for of in shrink.objectives if of.kind == "relations"]
    if "samples" in relates and micro_batch < 2:
        raise ConfigError(
            "shrink.objectives: got relations between samples with a training.train_batch_size of 1; allowed: patches, or "
            "micro-batches of 2 samples or more"
        )


def _check_apart(removed: tuple[str, ...]) -> None:
    """ConfigError if a part is named twice, or beside a part that it belongs to."""
    for part in removed:
        if removed.count(part) > 1:
            raise ConfigError(f"shrink.remove: got {part!r} twice; allowed: each part once")
        whole = "middle" if part == "middle.end" else re.sub(r"\.(encoder|decoder)\.", ".", part)
        if whole != part and whole in removed:
            raise ConfigError(
                f"shrink.remove: got {part!r} beside {whole!r}, which has it; allowed: one of them"
            )
