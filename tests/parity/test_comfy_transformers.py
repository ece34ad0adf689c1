"""A transformer's LoRA and its sampling settings beside what ComfyUI's code reads and computes."""

import pytest
import torch

from eval.random_teacher import build
from stepdistill.export.scheduler import step_options, student_scheduler
from stepdistill.models.adapters import add_adapter
from stepdistill.models.network.kind import kind_of

# The linear layers for which ComfyUI has an entry under diffusers' names, with the prefix `transformer.`, in each of these
# lists of blocks (comfy/utils.py: mmdit_to_diffusers, z_image_to_diffusers).
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KNOWN = {
    "sd35_medium": {
        "transformer_blocks": {
            *(
                f"attn.{name}"
                for name in (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
            ),
            *(f"attn2.{name}" for name in ATTENTION),
            *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
            *("norm1.linear", "norm1_context.linear"),
        }
    },
    "z_image": {
        blocks: {
            *(f"attention.{name}" for name in ATTENTION),
            *(f"feed_forward.w{number}" for number in (1, 2, 3)),
            "adaLN_modulation.0",
        }
        for blocks in ("layers", "noise_refiner", "context_refiner")
    },
}


@pytest.mark.parametrize("family", KNOWN)
def test_comfyui_knows_the_name_of_every_layer_with_a_lora(family):
    network = build(family, tiny=True).transformer
    parameters = add_adapter(network, "student", rank=1, seed=0, targets=kind_of(network).lora_targets)
    layers = {name.partition(".lora_")[0] for name in parameters}
    unknown = {
        name for name in layers if name.split(".", 2)[2] not in KNOWN[family].get(name.split(".", 2)[0], ())
    }
    assert len(layers) > 10
    assert not unknown


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [8, 4, 2, 1])
def test_comfyuis_simple_schedule_has_the_noise_levels_of_the_rung(steps, shift):
    """ComfyUI's table has sigma at 1000 even times; its scheduler "simple" takes every (1000 / steps)-th from the last."""
    times = torch.arange(1, 1001) / 1000
    table = shift * times / (1 + (shift - 1) * times)
    theirs = [float(table[-(1 + int(k * 1000 / steps))]) for k in range(steps)]
    scheduler = student_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}, "flow")
    scheduler.set_timesteps(**step_options(scheduler, steps))
    assert scheduler.sigmas.tolist() == pytest.approx([*theirs, 0.0], abs=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in theirs], abs=1e-3)
