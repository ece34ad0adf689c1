"""A complete run that takes a few seconds: two rungs of one update, a table of eight images, every kind of study."""

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

# The limits of a command on a damaged run, which may train, draw and measure everything again.
SECONDS, BYTES = 120, 2**30
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
    """Runs every stage in order, and `export` again so that the cards contain the numbers; returns the config."""
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
    """Copies a run into the folder `place`; returns the copy's config."""
    shutil.copytree(config.run_dir, place / config.name)
    copied = config.model_copy(update={"output_dir": str(place)})
    open_run(copied)
    return copied


def tree(folder):
    """sha256 of every file by its path inside the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: its exit code, the lines on standard error, the warnings."""

    code: int
    errors: list[str]
    warnings: list[str]

    @property
    def messages(self):
        """Everything that a user reads on standard error."""
        return "\n".join([*self.errors, *self.warnings])


def outcome_of(command, capsys, caplog):
    """Runs a command as the command line does. Exceptions that are not messages to the user are raised and fail the test."""
    warn_of_damage.cache_clear()
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stepdistill"), bounded(SECONDS, BYTES):
        code = guarded(command)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("stepdistill")]
    return Outcome(code, capsys.readouterr().err.strip().splitlines(), warnings)


@contextlib.contextmanager
def room_for(largest):
    """Lets no file grow beyond `largest` bytes, as on a full disk."""
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
    """Makes these folders read-only, for root too: this thread drops the capabilities that let root write anywhere."""
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
