"""The `ladder` section of a config: rungs, phases, objectives and discriminators. No torch."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stepdistill.config.objective_kinds import OBJECTIVES, check_kind, compares_features, is_adversarial
from stepdistill.config.section import (
    Affects,
    FilePath,
    LearningRate,
    PositiveInt,
    Section,
    Steps,
)

Frequency = Annotated[float, Field(ge=0, le=10**6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
TAP_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.]*$"
Tap = Annotated[str, Field(pattern=TAP_PATTERN, max_length=300)]
UPDATES_OF_FAKE_SCORE = 5
"""For each update of the student, as DMD2 has it on SDXL."""
PLACES = ("encoder", "middle", "decoder")
"""Places of taps; a smaller network may lack the middle."""


def _one_above_0(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("four numbers of 0 or more, at least one of them above 0")
    return weights


class DiscriminatorOptions(Section, affects=Affects.ITS_RUNG):
    """The discriminator of a phase whose objective is `paired` or `single`."""

    trunk: Literal["lora", "full", "frozen"] = "lora"
    """The trunk is the U-Net's encoder and mid-block, or the first two thirds of a transformer's blocks. lora: the base
    model's, with an adapter for the discriminator; full: a copy of the base model's, all of whose weights are trained;
    frozen: the base model's, unchanged."""
    heads: Literal["mid", "multi"] = "mid"
    """mid: one head, on the features of the mid-block; multi: that head and one more on every down block. Of a transformer:
    after two thirds of the blocks; and after a quarter and half of them."""
    head_width: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Channels inside each head, at most those of the features that it reads. A convolution of a head has 16 width^2
    parameters, which take 16 bytes each with gradient and moments. Default: the channels of the features."""
    loss: Literal["non_saturating", "relativistic"] = "non_saturating"
    """non_saturating judges each sample by itself (as in SDXL-Lightning); relativistic judges each real sample against the
    student's sample from the same x_t, or with `real: data` and `inputs: own` against any of the student's."""
    real: Literal["teacher", "data"] = "teacher"
    """What counts as real at timestep s, where the student's step ends. teacher: the teacher's samples (as in
    SDXL-Lightning); data: the training data noised to s, which needs no teacher."""
    start: Literal["fresh", "carried"] = "fresh"
    """Initial weights of trunk and heads. fresh: the base model's weights and new heads; carried: the weights at the end of
    this rung's previous adversarial phase. The heads are carried only if both phases have the same objective and `heads`,
    because a paired head reads twice the channels of a single one; otherwise the trunk alone is. The optimiser state is
    always new."""
    learning_rate: LearningRate | None = None
    """Learning rate of the discriminator's trunk and heads. Default: the phase's learning_rate."""
    perturbation_weights: Annotated[
        tuple[Frequency, Frequency, Frequency, Frequency], AfterValidator(_one_above_0)
    ] = (
        1.0,
        1.0,
        1.0,
        1.0,
    )
    """Relative frequencies of the timesteps 10, 250, 500 and 750, to which clean samples are re-noised before the
    discriminator sees them. SDXL-Lightning uses 1:1:1:1, and 5:1:1:1 in its last phases."""


ObjectiveName = Annotated[
    str, AfterValidator(check_kind), Field(json_schema_extra={"enum": list(OBJECTIVES)})
]


class WeightedObjective(Section, affects=Affects.ITS_RUNG):
    """One of several objectives of a phase."""

    kind: ObjectiveName
    """The objective; the values mean the same as those of the phase's `objective`."""
    weight: Weight = 1.0
    """Factor of this objective's student loss; the discriminator's loss is not multiplied."""
    final_weight: Weight | None = None
    """Factor at the phase's last update; between the first and the last update it follows `schedule`. Default: weight."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the factor gets from weight to final_weight: along a line, or along half a cosine, slowly at both ends."""

    taps: Annotated[tuple[Tap, ...], Field(min_length=1, max_length=64)] = ("middle",)
    """For l2, attention, gram, kernel and relations: where features are compared. encoder: after every block of the encoder;
    middle: after the mid-block; decoder: after every block of the decoder; or the names of modules of the network, such as
    up_blocks.1. The losses at several taps are averaged."""
    kernel: Literal["gaussian", "laplace"] = "gaussian"
    """For kernel: exp(-d^2 / 2 h^2) or exp(-d / h) of the distance d; h is the median distance between two positions of the
    teacher's features."""
    between: Literal["patches", "samples"] = "patches"
    """For relations: what is related. patches: the patches of one sample; samples: the samples of a micro-batch."""

    def weight_at(self, step: int, max_train_steps: int) -> float:
        """The factor at update `step`, counted from 0, of a phase with this many updates."""
        if self.final_weight is None:
            return self.weight
        share = min(1.0, step / max(1, max_train_steps - 1))
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.weight + share * (self.final_weight - self.weight)


class Phase(Section, affects=Affects.ITS_RUNG):
    """A number of updates that minimise the same objective or objectives."""

    objective: ObjectiveName | None = None
    """mse: mean squared error between the results of one student step and of the teacher's steps; convert: learn to output
    the rung's prediction_type, allowed only as the rung's first phase; paired and single: adversarial, with a discriminator
    that sees each sample beside the x_t from which the step starts (paired) or alone (single); dmd: distribution matching
    against the base model with guidance, with a fake score that learns the student's images; output: mean squared error
    between the outputs of student and teacher at the same x_t; denoise: between the student's output and the noise in the
    data, as a diffusion model is trained. l2, attention, gram, kernel and relations compare features inside the network with
    the teacher's at the same x_t (docs/method.md)."""
    objectives: Annotated[tuple[WeightedObjective, ...], Field(max_length=8)] = ()
    """Several objectives at once, in place of `objective`, such as [{kind: mse}, {kind: single, weight: 0.1}]. Their losses
    on the same samples are added."""
    balance: Literal["none", "gradient"] = "none"
    """none: the weights multiply the losses. gradient: the weights are the shares of the objectives in the student's
    gradient. Every tenth update measures the norm of each objective's gradient, by a backward pass for each, and the losses
    are scaled so that these norms are in proportion to the weights. The first objective's loss keeps its scale."""
    max_train_steps: PositiveInt = 100
    """Number of updates. With critic_updates, those of discriminator and fake score."""
    critic_updates: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Updates of discriminator and fake score for each update of the student, which is the last of them (DMD2's two
    time-scale rule). Default: 5 with dmd, otherwise 1."""
    inputs: Literal["data", "own"] = "data"
    """Where the student's steps start in training. data: at noised training data; own: at the samples that the student
    itself reaches from pure noise with the rung's sampler, as when it draws."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples that are trained without their prompt."""
    fake_score_learning_rate: LearningRate | None = None
    """For dmd: learning rate of the fake score, a LoRA on the base model. Default: learning_rate."""
    learning_rate: LearningRate = 1e-3
    """Learning rate of the student's LoRA after warm-up."""
    teacher_steps: Steps | None = None
    """student_steps of an earlier rung whose student is the teacher in this phase (skip-level). Default: the rung's
    teacher_steps."""
    teacher: Literal["rung", "ema"] = "rung"
    """rung: the base model on the first rung, later the student of an earlier rung, which stays as it is; ema: the moving
    average of this phase's own student, which begins as it (self-distillation; not on the first rung, which learns
    guidance)."""
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """For teacher: ema: the share of the average that stays in an update."""
    loss_space: Literal[
        "prev_sample", "epsilon", "sample", "v_prediction", "velocity", "truncated_snr", "auto"
    ] = "prev_sample"
    """Space in which mse measures the error. prev_sample: the sample at the end of the step (as in SDXL-Lightning); epsilon,
    sample (x0), v_prediction and velocity: the same error expressed in that quantity; truncated_snr: the x0 error weighted
    by max(SNR, 1); auto: the quantity that the student predicts."""
    cached_updates: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """For mse alone: keep the batches and teacher samples of this many updates and reuse them in turn. Default: every update
    has new ones."""
    discriminator: DiscriminatorOptions = DiscriminatorOptions()
    """The discriminator of a phase whose objective is `paired` or `single`."""

    @property
    def weighted(self) -> tuple[WeightedObjective, ...]:
        """The phase's objectives with their weights; `objective` is short for one objective of weight 1."""
        short = () if self.objective is None else (WeightedObjective(kind=self.objective),)
        return self.objectives or short

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the phase's objectives, in order."""
        return tuple(objective.kind for objective in self.weighted)

    @property
    def title(self) -> str:
        """Such as "mse" or "mse+single"; part of the phase's random keys and of its file names."""
        return "+".join(self.kinds)

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps of all objectives that compare features, each once."""
        taps = (tap for of in self.weighted if compares_features(of.kind) for tap in of.taps)
        return tuple(dict.fromkeys(taps))

    def options_of(self, kind: str) -> WeightedObjective:
        """The objective of this kind; KeyError if the phase has none."""
        return {of.kind: of for of in self.weighted}[kind]

    @property
    def adversary(self) -> str | None:
        """The kind of the phase's adversarial objective; None if it has none."""
        return next((kind for kind in self.kinds if is_adversarial(kind)), None)

    @property
    def critics(self) -> tuple[str, ...]:
        """The roles that learn beside the student, each once: "discriminator", "fake_score"."""
        roles = (OBJECTIVES[kind].critic for kind in self.kinds)
        return tuple(dict.fromkeys(role for role in roles if role is not None))

    @property
    def matches_distributions(self) -> bool:
        """Whether an objective compares the base's score with a fake score."""
        return "fake_score" in self.critics

    @property
    def updates_per_student_update(self) -> int:
        """critic_updates, with the default filled in."""
        return self.critic_updates or (UPDATES_OF_FAKE_SCORE if self.matches_distributions else 1)

    def student_learns_at(self, step: int) -> bool:
        """Whether update `step`, counted from 0, updates the student too."""
        return (step + 1) % self.updates_per_student_update == 0

    @property
    def student_updates(self) -> int:
        """Number of the student's updates."""
        return self.max_train_steps // self.updates_per_student_update

    @property
    def needs_teacher_moves(self) -> bool:
        """Whether an objective asks for the teacher's moves from t to s."""
        asked = {OBJECTIVES[kind].teacher for kind in self.kinds}
        return "moves" in asked or ("real" in asked and self.discriminator.real == "teacher")

    @property
    def asks_teacher(self) -> bool:
        """Whether an objective asks the teacher for anything."""
        return self.needs_teacher_moves or any(
            OBJECTIVES[kind].teacher in ("prediction", "features") for kind in self.kinds
        )

    def weights_at(self, step: int) -> dict[str, float]:
        """The factor of each objective's student loss at update `step`, counted from 0, by the objective's kind."""
        return {of.kind: of.weight_at(step, self.max_train_steps) for of in self.weighted}

    @property
    def changes_weights(self) -> bool:
        """Whether the factors of the objectives change from update to update."""
        return self.balance != "none" or any(of.final_weight is not None for of in self.weighted)

    def loss_space_for(self, student_prediction_type: str) -> str:
        """loss_space, with `auto` replaced by what the student predicts."""
        return student_prediction_type if self.loss_space == "auto" else self.loss_space


class Rung(Section, affects=Affects.ITS_RUNG):
    """One rung of the ladder: a student learns to draw in student_steps what its teacher draws in teacher_steps."""

    teacher_steps: Steps
    """Sampling steps of the teacher. The first rung's teacher is the base model, at any number of steps (128 in
    SDXL-Lightning). Every later rung's teacher is the student of the rung before, so the value must be that rung's
    student_steps."""
    student_steps: Steps
    """Sampling steps of the student that this rung trains; a proper divisor of teacher_steps. On the first rung it may also
    equal teacher_steps: the student then learns guidance alone."""
    node_steps: Steps | None = None
    """Train the student at the timesteps of a sampler with this many steps, a multiple of student_steps. Default:
    student_steps. SDXL-Lightning has 4 on its 2-step and 1-step rungs."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the student predicts (sample is x0). Default: the same as the rung before, on the first rung as the teacher. If
    the value differs from that, the rung must begin with a convert phase. SDXL-Lightning's 1-step rung predicts
    sample."""
    init: FilePath | None = None
    """A rung's folder, or a LoRA's file, whose weights the student begins with in place of the rung before's, such as one
    that `stepdistill merge` made. Its base and its rank must be those of this run."""
    start_timestep: Annotated[int, Field(gt=0, lt=1000)] | None = None
    """For a 1-step rung without node_steps: the conditioning timestep that the U-Net is given with pure noise. Default: the
    last timestep. At an earlier one an error in epsilon weighs far less in the image: in Stable Diffusion's noise schedule
    it is multiplied by 1.6 at timestep 499, but by 14.6 at 999."""
    phases: Annotated[tuple[Phase, ...], Field(min_length=1, max_length=64)]
    """The phases, in the order in which they are trained."""
