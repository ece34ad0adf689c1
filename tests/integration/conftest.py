import itertools
import json
import shutil

import pytest

from stepdistill import stages
from stepdistill.config.load import load_config
from stepdistill.export.rung import export_rung
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.shared_network import STUDENT

STEPS = (128, 32, 8, 4, 2, 1)
MSE = {"objective": "mse", "max_train_steps": 2}
SMALL = [
    "data.num_images=40",
    "training.train_batch_size=4",
    "preview.prompts=['a red letter a on white']",
    "preview.looks_images=0",
    "evaluation.num_images=16",
    "evaluation.grid_columns=4",
    "evaluation.diversity_prompts=2",
    "evaluation.diversity_seeds=2",
    "evaluation.lora_scales=[0.5]",
    "evaluation.study_images=1",
    "evaluation.cost_batch_sizes=[2]",
]
"""Few samples, images and studies."""
LOOKS = "preview.looks_images=2"
"""For the runs that tests of phases' looks and of reports read: it takes 128 steps of the teacher."""


def student_of(shared):
    """The student on the network that the rungs of a letters run share."""
    return Denoiser(shared.network, STUDENT, shared.noise_path, "epsilon", trains=True)


def tiny_config(output_dir, *overrides):
    """The letters teacher distilled 128 -> 32 -> 8 -> 4 -> 2 -> 1 with two updates per phase, the last rung converted to x0,
    and 16 images per row."""
    ladder = [{"teacher_steps": t, "student_steps": s, "phases": [MSE]} for t, s in itertools.pairwise(STEPS)]
    ladder[-1] |= {"prediction_type": "sample", "phases": [MSE | {"objective": "convert"}, MSE]}
    options = [f"output_dir={output_dir}", *SMALL, f"ladder={json.dumps(ladder)}", *overrides]
    return load_config("configs/letters.yaml", options)


@pytest.fixture(scope="session")
def trained_run(made_once):
    """The config of the tiny ladder, trained and exported but not evaluated."""

    def make(folder):
        config = tiny_config(folder, LOOKS)
        stages.prepare(config)
        stages.distill(config)
        stages.export(config)

    return tiny_config(made_once("trained", make), LOOKS)


@pytest.fixture(scope="session")
def finished_run(made_once, trained_run):
    """The config of a complete run of the tiny ladder: every stage in order."""

    def make(folder):
        shutil.copytree(trained_run.output_dir, folder, dirs_exist_ok=True)
        stages.run_all(tiny_config(folder, LOOKS))

    return tiny_config(made_once("finished", make), LOOKS)


@pytest.fixture(scope="module")
def rung(tmp_path_factory):
    """(config, teacher's folder, exported folder) of a 4-step rung on a tiny SD1.5."""
    from tests.integration.exported import rung_of

    config, teacher, _ = rung_of(tmp_path_factory.mktemp("sd15"), "sd15", "export.dtype=float32")
    return config, teacher, export_rung(config, 4)
