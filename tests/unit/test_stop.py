"""When training is asked to stop: after training.max_minutes, counted from the command's start."""

import time

from stepdistill.errors import TO_BE_CONTINUED
from stepdistill.run.stop import StopRequest


def test_the_time_counts_from_the_commands_start():
    hour_ago = time.monotonic() - 3600
    used, left = (StopRequest(max_minutes=minutes, began=hour_ago) for minutes in (59, 61))
    assert (used.exit_code, used.reason) == (TO_BE_CONTINUED, "training.max_minutes is used")
    assert left.exit_code == 0


def test_without_a_start_the_time_counts_from_now():
    assert StopRequest(max_minutes=1).exit_code == 0
    assert StopRequest(max_minutes=1e-9).exit_code == TO_BE_CONTINUED
    assert StopRequest(max_minutes=None, began=0.0).exit_code == 0
