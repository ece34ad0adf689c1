"""A whole run in a few seconds, to be damaged: two rungs of one update, a table of eight images, every kind of study."""

import contextlib
import ctypes
import hashlib
import json
import logging
import resource
import shutil
from dataclasses import dataclass

from stepdistill import stages
from stepdistill.cli import guarded
from stepdistill.config.load import load_config
from stepdistill.disk.durable import warn_of_damage
from stepdistill.stages import open_run
from tests.faults.bounds import bounded

SECONDS, BYTES = (
    120,
    2**30,
)  # that a command may take on a damaged run: it may train, draw and measure all of it again
LADDER = [
    {"teacher_steps": t, "student_steps": s, "phases": [{"objective": "mse", "max_train_steps": 1}]}
    for t, s in ((4, 2), (2, 1))
]


def small_config(output_dir, *overrides):
    return load_config(
        "configs/letters.yaml",
        [
            f"output_dir={output_dir}",
            "data.num_images=8",
            "training.train_batch_size=4",
            "preview.prompts=['a red letter a on white']",
            "evaluation.num_images=8",
            "evaluation.batch_size=4",
            "evaluation.teacher_steps=[4]",
            "evaluation.unguided_steps=[]",
            "evaluation.grid_columns=8",
            "evaluation.diversity_prompts=1",
            "evaluation.diversity_seeds=2",
            "evaluation.lora_scales=[0.5]",
            "evaluation.study_images=2",
            "evaluation.cost_batch_sizes=[1]",
            "evaluation.matrix=false",
            f"ladder={json.dumps(LADDER)}",
            *overrides,
        ],
    )


def make_run(output_dir):
    """Every stage in sequence, the cards with their numbers; returns the config."""
    config = small_config(output_dir)
    for stage in (
        stages.prepare,
        stages.distill,
        stages.export,
        stages.evaluate,
        stages.report,
        stages.export,
    ):
        stage(config)
    return config


def copy_of(config, place):
    """The config of a copy of a run."""
    shutil.copytree(config.run_dir, place / config.name)
    there = config.model_copy(update={"output_dir": str(place)})
    open_run(there)
    return there


def tree(folder):
    """sha256 of every file by its place."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Answer:
    """What a command came to: its exit code, the lines on standard error, the warnings."""

    code: int
    errors: list[str]
    warnings: list[str]

    @property
    def said(self):
        """All that a user reads on standard error."""
        return "\n".join([*self.errors, *self.warnings])


def answer(command, capsys, caplog):
    """A command as the command line runs it; what is no message to the user stays an exception, and fails the test."""
    warn_of_damage.cache_clear()
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stepdistill"), bounded(SECONDS, BYTES):
        code = guarded(command)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("stepdistill")]
    return Answer(code, capsys.readouterr().err.strip().splitlines(), warnings)


@contextlib.contextmanager
def room_for(largest):
    """No file may grow beyond so many bytes, as where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Rights(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_OVERRIDE, _SEARCH = 1 << 1, 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH of capabilities(7)


@contextlib.contextmanager
def read_only(*folders):
    """Nothing may be made or removed in these folders, by root either: this thread goes without its right to."""
    libc, header, rights = ctypes.CDLL(None), _Header(0x20080522, 0), (_Rights * 2)()
    modes = {folder: folder.stat().st_mode for folder in folders}
    libc.capget(ctypes.byref(header), rights)
    before = rights[0].effective
    rights[0].effective = before & ~(_OVERRIDE | _SEARCH)
    for folder in folders:
        folder.chmod(0o555)
    assert libc.capset(ctypes.byref(header), rights) == 0
    try:
        yield
    finally:
        rights[0].effective = before
        libc.capset(ctypes.byref(header), rights)
        for folder, mode in modes.items():
            folder.chmod(mode)
