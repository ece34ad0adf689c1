"""Finished rungs without training: a tiny pipeline of a real family, and a random LoRA in a run's folder."""

import dataclasses
import json

import torch

from eval.random_teacher import build
from stepdistill.config.load import parse_config
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import sha256_file
from stepdistill.ladder import save_lora
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.run.rungs import WEIGHT_NAME, RungRecord, rung_folder
from stepdistill.stages import open_run
from stepdistill.teacher.loading import fingerprint
from tests.integration.conftest import tiny_config

RANK = 4


def random_student(teacher, *, rank=RANK, seed=0):
    """The teacher's U-Net with a random student LoRA that changes its output by about a tenth."""
    network = SharedNetwork(load_network(teacher))
    parameters = network.add_adapter(STUDENT, rank=rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def write_rung(config, teacher, steps, *, rank=RANK, seed=0, prediction_type="epsilon", start_timestep=None):
    """Writes rungs/<steps> as `distill` does; returns the network with the student."""
    network = random_student(teacher, rank=rank, seed=seed)
    folder = rung_folder(config.run_dir, steps)
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(network, folder)
    RungRecord(
        student_steps=steps,
        teacher_steps=2 * steps,
        prediction_type=prediction_type,
        lora_rank=rank,
        base_fingerprint=fingerprint(teacher),
        sha256=sha256_file(folder / WEIGHT_NAME),
        training_seconds=1.0,
        start_timestep=start_timestep,
    ).write(folder)
    return network


def update_rung_json(folder):
    """Writes rung.json for the LoRA that is now in the folder, as if it had been trained."""
    record = RungRecord.read(folder)
    dataclasses.replace(record, sha256=sha256_file(folder / WEIGHT_NAME)).write(folder)


def rung_of(place, family, *overrides, steps=4, **options):
    """A run with one finished rung on a tiny pipeline of a family: (config, teacher's folder, network with the student)."""
    teacher = place / "teacher"
    if not teacher.is_dir():
        build(family, tiny=True).save_pretrained(teacher, safe_serialization=True)
    phases = [{"objective": "mse", "max_train_steps": 1}]
    ladder = [
        {"teacher_steps": 2 * n, "student_steps": n, "phases": phases}
        for n in (8, 4, 2, 1)
        if n <= max(8, steps)
    ]
    config = tiny_config(place, f"teacher.path={teacher}", f"ladder={json.dumps(ladder)}", *overrides)
    open_run(config)
    kind = {"sd21_v": "v_prediction"}.get(family, "epsilon")
    network = write_rung(config, teacher, steps, **{"prediction_type": kind, **options})
    return config, teacher, network


def with_export(config, **options):
    """The config with changed values in its export section."""
    return parse_config(resolved(config) | {"export": {**resolved(config)["export"], **options}})


@torch.no_grad()
def unet_output(unet, inputs):
    """The output (B, C, H, W) of a U-Net for inputs from onnx_unet.inputs_of."""
    added = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs} or None
    return unet(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
