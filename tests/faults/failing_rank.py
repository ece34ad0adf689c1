"""Runs the command line in one process of a launch and lets that process fail at a chosen place, as a cluster would.

python -m tests.faults.failing_rank PLACE FAILURE RANK STAGE CONFIG [key=value ...]

PLACE    update, move and drawing of images (the second one), save and half_saved (the checkpoint after the second update),
         rung (its end), none
FAILURE  killed (SIGKILL), stopped (SIGSTOP), raised, told (SIGTERM), asleep (for an hour, as if it waited on a GPU for
         another process), or nan: the place's result is not a number
RANK     the process that fails, in the first attempt of the launch only
"""

import math
import os
import signal
import sys
import time

from stepdistill.cli import app, guarded
from stepdistill.disk import durable
from stepdistill.evaluation.draw.sampler import Sampler
from stepdistill.ladder import rung_files
from stepdistill.models.denoiser import Denoiser
from stepdistill.training import phase
from stepdistill.training.checkpoint import Checkpoints

MESSAGE = "the wind has blown the papers away"
# owner and name of a function, and which of its calls fails; at half_saved, a checkpoint's files lie beside its place
PLACES = {
    "update": (phase, "update", 2),
    "move": (Denoiser, "moved", 2),
    "save": (Checkpoints, "save", 3),
    "half_saved": (durable, "replace_folder", 3),
    "rung": (rung_files, "replace_folder", 1),
    "drawing": (Sampler, "draw", 2),
}
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "told": signal.SIGTERM}


def fail(failure):
    if failure == "raised":
        raise RuntimeError(MESSAGE)
    if failure == "asleep":
        time.sleep(3600)
    os.kill(os.getpid(), SIGNALS[failure])
    if failure == "stopped":
        time.sleep(60)  # any thread may take the signal; this one would go on until then


def let_fail(place, failure):
    owner, name, number = PLACES[place]
    before, calls = getattr(owner, name), []

    def failing(*args, **options):
        calls.append(name)
        if len(calls) != number:
            return before(*args, **options)
        if failure == "nan":
            return before(*args, **options) * math.nan
        fail(failure)
        return before(*args, **options)

    setattr(owner, name, failing)


def main(place, failure, rank, *arguments):
    is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if place != "none" and is_first_attempt and os.environ["RANK"] == rank:
        let_fail(place, failure)
    return guarded(lambda: app(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
