"""What a config says of the ladder: rungs, their phases, the adversary; and how they must fit together. No torch."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from stepdistill.config.section import ConfigError, PositiveFloat, PositiveInt, Section, Steps

ADVERSARIAL = ("paired", "single")
"""The objectives that have a discriminator."""


class DiscriminatorOptions(Section):
    """The adversary of `paired` and `single` phases."""

    trunk: Literal["lora", "full", "frozen"] = "lora"
    """Encoder and mid-block: the base with an adapter, a copy trained whole, or the base as it is."""
    heads: Literal["mid", "multi"] = "mid"
    """A head on the mid-block, or there and on every down block."""
    loss: Literal["non_saturating", "relativistic"] = "non_saturating"
    """Each sample judged alone (the paper's form), or each teacher sample against its student's."""
    real: Literal["teacher", "data"] = "teacher"
    """What D takes for real: the teacher's x_s (the paper's form), or the data noised to s, which needs no teacher."""
    start: Literal["fresh", "carried"] = "fresh"
    """What trunk and heads begin with: the base and new heads, or those that the adversarial phase before on this rung left.
    Heads carry over between phases of the same objective and `heads`; a paired one reads twice the channels of a single one,
    so between these the trunk alone does. The optimiser begins anew."""
    learning_rate: PositiveFloat | None = None
    """Of trunk and heads; the phase's own where not given."""
    perturbation_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """How often a clean sample is re-noised to t* = 10, 250, 500, 750 before D sees it; later 5:1:1:1."""


ObjectiveKind = Literal["mse", "convert", "paired", "single"]


class WeightedObjective(Section):
    """One of the objectives of a phase."""

    kind: ObjectiveKind
    """As `objective`."""
    weight: PositiveFloat = 1.0
    """What the student's loss is multiplied by; the discriminator's own loss is not."""


class Phase(Section):
    """What a number of updates minimise."""

    objective: ObjectiveKind | None = None
    """mse to the teacher; convert the output to the rung's prediction_type, as its first phase; adversarial with D told x_t
    (paired) or not (single)."""
    objectives: Annotated[tuple[WeightedObjective, ...], Field(max_length=8)] = ()
    """Several at once in place of `objective`, such as [{kind: mse}, {kind: single, weight: 0.1}]: their losses on the same
    samples are added."""
    max_train_steps: PositiveInt = 100
    """Updates."""
    learning_rate: PositiveFloat = 1e-3
    """Of the student's LoRA, after warm-up."""
    teacher_steps: Steps | None = None
    """Another rung of this ladder as teacher (skip-level); the rung's own where not given."""
    loss_space: Literal["prev_sample", "epsilon", "sample", "v_prediction", "truncated_snr", "auto"] = (
        "prev_sample"
    )
    """Where mse is measured; auto is what the student predicts."""
    cached_updates: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Of mse: the batches and teacher's samples of so many updates are kept and used again in turn; all new if not given."""
    discriminator: DiscriminatorOptions = DiscriminatorOptions()
    """Of paired and single phases."""

    @property
    def weighted(self) -> tuple[WeightedObjective, ...]:
        """Its objectives; `objective` is the short form of one of weight 1."""
        short = () if self.objective is None else (WeightedObjective(kind=self.objective),)
        return self.objectives or short

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of its objectives, in order."""
        return tuple(objective.kind for objective in self.weighted)

    @property
    def title(self) -> str:
        """Such as "mse", or "mse+single"; it also names the phase's randomness and files."""
        return "+".join(self.kinds)

    @property
    def adversary(self) -> str | None:
        """The objective that has a discriminator, where there is one."""
        return next((kind for kind in self.kinds if kind in ADVERSARIAL), None)

    def loss_space_for(self, student_prediction_type: str) -> str:
        """Where mse is measured: `auto` is what the student predicts."""
        return student_prediction_type if self.loss_space == "auto" else self.loss_space


class Rung(Section):
    """One step reduction."""

    teacher_steps: Steps
    """Steps of the teacher: 128 of the base model for the first rung, the student before after that."""
    student_steps: Steps
    """Steps of the student that this rung makes; on the first rung as many as the teacher's teach guidance alone."""
    node_steps: Steps | None = None
    """The grid whose nodes the student is trained at; its own where not given (recipe: 4 for the 2- and 1-step rungs)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the student predicts; as the rung before where not given. Where it is another, the rung begins with a convert
    phase: the recipe's 1-step rung predicts "sample" (x0)."""
    start_timestep: Annotated[int, Field(gt=0, lt=1000)] | None = None
    """Of the 1-step rung: the timestep that the U-Net is told with the pure noise; its last one where not given. Earlier,
    an error of epsilon weighs far less in the picture: 1.6-fold at 499, 14.6-fold at 999 of Stable Diffusion's schedule."""
    phases: Annotated[tuple[Phase, ...], Field(min_length=1, max_length=64)]
    """In order."""


def check_ladder(ladder: tuple[Rung, ...]) -> None:
    """ConfigError where rungs do not follow each other, or a phase does not fit its rung."""
    for index, rung in enumerate(ladder):
        _check_rung(index, ladder)
        for number, phase in enumerate(rung.phases):
            key = f"ladder.{index}.phases.{number}"
            _check_objectives(key, phase)
            _check_phase(key, phase, rung, ladder[:index])
            _check_convert(f"{key}.objective", phase, rung, number)
            _check_start(f"{key}.discriminator.start", phase, rung.phases[:number])


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n) if n % k == 0]


def _check_rung(index: int, ladder: tuple[Rung, ...]) -> None:
    rung, key = ladder[index], f"ladder.{index}"
    allowed = _divisors(rung.teacher_steps) + ([] if index else [rung.teacher_steps])
    if rung.student_steps not in allowed:
        nearest = min(allowed, key=lambda n: abs(n - rung.student_steps), default=1)
        raise ConfigError(
            f"{key}.student_steps: got {rung.student_steps}; {rung.teacher_steps} teacher steps do not divide into it; "
            f"allowed: {', '.join(map(str, allowed))}; nearest: {nearest}"
        )
    if index and rung.teacher_steps != ladder[index - 1].student_steps:
        raise ConfigError(
            f"{key}.teacher_steps: got {rung.teacher_steps}; allowed: {ladder[index - 1].student_steps}, "
            f"the student of the rung before"
        )
    if rung.node_steps is not None and rung.node_steps % rung.student_steps:
        raise ConfigError(
            f"{key}.node_steps: got {rung.node_steps}; allowed: multiples of student_steps {rung.student_steps}"
        )
    if rung.start_timestep is not None and (rung.student_steps, rung.node_steps or 1) != (1, 1):
        raise ConfigError(
            f"{key}.start_timestep: got {rung.start_timestep}; allowed: on a rung of 1 student step, without node_steps"
        )


def _check_phase(key: str, phase: Phase, rung: Rung, earlier: tuple[Rung, ...]) -> None:
    allowed = [r.student_steps for r in earlier if r.student_steps % rung.student_steps == 0] or [
        rung.teacher_steps
    ]
    if phase.teacher_steps is not None and phase.teacher_steps not in allowed:
        raise ConfigError(
            f"{key}.teacher_steps: got {phase.teacher_steps}; allowed: {', '.join(map(str, allowed))}, "
            f"the students of earlier rungs"
        )
    if phase.kinds != ("mse",) and phase.cached_updates is not None:
        raise ConfigError(
            f"{key}.cached_updates: got {phase.cached_updates}; allowed: on an mse phase, this is {phase.title}"
        )


def _check_objectives(key: str, phase: Phase) -> None:
    """ConfigError where a phase names no objective, both forms, or objectives that do not go together."""
    if not phase.weighted:
        raise ConfigError(f"{key}.objective: got nothing; allowed: {', '.join(get_args(ObjectiveKind))}")
    if not phase.objectives:
        return
    key = f"{key}.objectives"
    if phase.objective is not None:
        raise ConfigError(
            f"{key}: got a list beside objective: {phase.objective}; allowed: one of the two keys"
        )
    twice = next((kind for kind in phase.kinds if phase.kinds.count(kind) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key}: got {twice} twice; allowed: each kind once, with its weight")
    if len(set(phase.kinds) & set(ADVERSARIAL)) > 1:
        raise ConfigError(
            f"{key}: got paired and single; allowed: one of them, as a phase has one discriminator"
        )
    if "convert" in phase.kinds and len(phase.kinds) > 1:
        raise ConfigError(
            f"{key}: got convert beside {', '.join(k for k in phase.kinds if k != 'convert')}; allowed: convert alone, "
            f"as it learns another kind of output first"
        )


def _check_convert(key: str, phase: Phase, rung: Rung, number: int) -> None:
    if "convert" not in phase.kinds:
        return
    if rung.prediction_type is None:
        raise ConfigError(
            f'{key}: got "convert", on a rung without prediction_type; allowed: on a rung that has one, such as '
            f"prediction_type: sample"
        )
    if number:
        raise ConfigError(
            f'{key}: got "convert" after "{rung.phases[number - 1].title}", whose work it would undo, as it learns from '
            f"the rung before; allowed: as the first phase of its rung"
        )


def _check_start(key: str, phase: Phase, before: tuple[Phase, ...]) -> None:
    options = phase.discriminator
    if options.start == "fresh":
        return
    if phase.adversary is None:
        raise ConfigError(f"{key}: got carried; allowed: on a paired or single phase, this is {phase.title}")
    previous = next((p for p in reversed(before) if p.adversary is not None), None)
    if previous is None:
        raise ConfigError(
            f"{key}: got carried; allowed: fresh, as this is the first adversarial phase of its rung"
        )
    if previous.discriminator.trunk != options.trunk:
        raise ConfigError(
            f"{key}: got carried; allowed: with the trunk of the adversarial phase before, "
            f"{previous.discriminator.trunk}, this has {options.trunk}"
        )
    same_heads = (previous.adversary, previous.discriminator.heads) == (phase.adversary, options.heads)
    if options.trunk == "frozen" and not same_heads:
        raise ConfigError(
            f"{key}: got carried; allowed: fresh, as a frozen trunk learns nothing and the heads of the phase before "
            f"({previous.adversary}, {previous.discriminator.heads}) do not fit ({phase.adversary}, {options.heads})"
        )
