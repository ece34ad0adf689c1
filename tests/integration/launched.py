"""Runs of a few seconds, trained by one process or by a launch of several."""

import json
import os
import shutil

import torch
from safetensors.torch import load_file

from stepdistill import stages
from stepdistill.run.log import read_log
from stepdistill.run.rungs import WEIGHT_NAME, rung_folder
from tests.integration.conftest import tiny_config
from tests.integration.forks import Fork

SECONDS = 300  # more than any of these launches takes on a busy machine
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
STUDENTS = (4, 2)
_RATE = 1e-3
LADDER = [
    {
        "teacher_steps": 8,
        "student_steps": 4,
        "phases": [
            {"objective": "mse", "max_train_steps": 3, "learning_rate": _RATE},
            {"objective": "single", "max_train_steps": 2, "learning_rate": _RATE},
        ],
    },
    {
        "teacher_steps": 4,
        "student_steps": 2,
        "phases": [{"objective": "mse", "max_train_steps": 2, "learning_rate": _RATE}],
    },
]
TABLE = {
    "num_images": 8,
    "batch_size": 2,
    "teacher_steps": [4],
    "unguided_steps": [],
    "diversity_prompts": 0,
    "lora_scales": [],
    "cost_batch_sizes": [],
    "matrix": False,
    "floor": False,
}


def config_of(folder, *overrides, samples=2):
    """A run of two rungs, with a checkpoint after every update and `samples` in a micro-batch."""
    return tiny_config(
        folder,
        f"ladder={json.dumps(LADDER)}",
        f"evaluation={json.dumps(TABLE)}",
        "training.checkpoint={every_minutes: 0, keep: 2}",
        f"training.train_batch_size={samples}",
        *overrides,
    )


def prepared(config, cache):
    """The run with a copy of the cache of another one."""
    stages.open_run(config)
    shutil.copytree(cache, config.run_dir / "cache")
    return config


def environment(**more):
    """One thread in each process, because sums depend on the number of threads."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def started(launch, *arguments, **more):
    """A launch as a process, with forks in place of new processes; more: environment variables."""
    return Fork([*launch, *arguments], environment(**more))


def ended(launch, *arguments, **more):
    """(exit code, standard error) of a launch."""
    process = started(launch, *arguments, **more)
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, errors


def distilled(launch, config, *overrides):
    """Standard error of `stepdistill distill`, which ends without an error."""
    code, errors = ended(
        launch, "-m", "stepdistill", "distill", str(config.run_dir / "config.yaml"), *overrides
    )
    assert code == 0, errors[-3000:]
    return errors


def weights_of(config):
    """The bytes of the LoRAs."""
    return [(rung_folder(config.run_dir, n) / WEIGHT_NAME).read_bytes() for n in STUDENTS]


def difference(one, other):
    """The difference between what two runs learned, relative to it: of the matrices B of the LoRAs, which start from zero.

    Single entries may differ more: where a gradient is zero up to rounding, Adam takes a whole step in its direction.
    """
    learned = []
    for run in (one, other):
        files = [load_file(rung_folder(run.run_dir, steps) / WEIGHT_NAME) for steps in STUDENTS]
        parts = [tensor.flatten() for file in files for key, tensor in file.items() if "lora_B" in key]
        learned.append(torch.cat(parts))
    return ((learned[0] - learned[1]).norm() / learned[0].norm()).item()


def log_of(config):
    """The log without times."""
    lines = read_log(config.run_dir / "log.jsonl")
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "data_seconds")} for line in lines
    ]


def said(errors):
    """The lines that stepdistill printed about errors."""
    return [line for line in errors.splitlines() if line.startswith("stepdistill: ")]
