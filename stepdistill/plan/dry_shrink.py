"""One update of the training of a smaller base, on the meta device: its memory, arithmetic and traffic on a GPU.

With `keep`, which parts are removed is not known before they are measured, and the update is that of the whole U-Net.
"""

import torch
from diffusers import UNet2DConditionModel

from stepdistill.config import RunConfig, Rung
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.plan.cards import Card
from stepdistill.plan.dry_update import (
    OPTIMISER,
    Parts,
    UpdateCost,
    base_bytes,
    hold_role,
    named_parts,
    trace_update,
)
from stepdistill.plan.rehearsal import Rehearsal
from stepdistill.plan.tracker import Tracker, Work, gpu_kernels
from stepdistill.runtime import WEIGHT_DTYPES
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.small_base import ladder_facts
from stepdistill.training.phase import optimizers_of
from stepdistill.training.samples import Samples


def shrink_rung(config: RunConfig, facts: TeacherFacts) -> Rung:
    """The training of the smaller base as a rung of one phase, at all timesteps."""
    assert config.shrink is not None
    count = facts.num_train_timesteps  # which may be more than a config allows
    return Rung.model_construct(
        teacher_steps=count,
        student_steps=count,
        node_steps=None,
        start_timestep=None,
        phases=(config.shrink.phase,),
    )


def shrink_update(config: RunConfig, facts: TeacherFacts, card: Card) -> UpdateCost:
    """What one update takes, in which all weights of the smaller U-Net are trained beside the original one."""
    rung, training = shrink_rung(config, facts), config.training
    phase, dtype = rung.phases[0], WEIGHT_DTYPES[training.mixed_precision]
    rehearsal = Rehearsal(config, facts, device="meta")
    with torch.device("meta"), gpu_kernels():
        original = UNet2DConditionModel.from_config(dict(facts.unet)).eval().requires_grad_(False).to(dtype)
        smaller = UNet2DConditionModel.from_config(dict(ladder_facts(config, facts).unet)).eval()
        network = SharedNetwork.trained_whole(
            smaller, dtype=dtype, gradient_checkpointing=training.gradient_checkpointing
        )
        student, teacher = rehearsal.on_networks(network, SharedNetwork(original))
        traced = training.model_copy(update={"optimizer": "adam"})
        optimizers = optimizers_of(phase, traced, network, {STUDENT: 1e-4})
        optimizers[STUDENT].step()  # makes the moments
        part = Parts(network, is_adversarial=False)
        tracker = Tracker(card, label=part.current)
        tracker.hold_bytes(base_bytes(original.modules(), training.base_quantization), "teacher: weights")
        hold_role(tracker, STUDENT, optimizers[STUDENT], config)
        batch = rehearsal.inputs.micro_batch()
        peak, parts = trace_update(
            tracker,
            part,
            phase,
            optimizers,
            lambda: Samples(batch, student=student, teacher=teacher, taps=phase.taps),
            config,
        )
    micro = training.gradient_accumulation_steps
    work = {name: done * (1 if name == OPTIMISER else micro) for name, done in tracker.work.items()}
    return UpdateCost(peak, named_parts(parts), tracker.now, work, sum(tracker.work.values(), Work()))
