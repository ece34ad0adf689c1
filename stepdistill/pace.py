"""How long a U-Net pass takes, as the updates in a run's log took. No torch."""

import statistics

from stepdistill.config import RunConfig
from stepdistill.plan import phase_forwards
from stepdistill.run.log import read_log


def measured_seconds_per_pass(config: RunConfig) -> float | None:
    """Seconds of one U-Net pass of one sample: the median over the updates that log.jsonl holds of this ladder; None where
    there are none."""
    passes = {
        (rung.student_steps, number): phase_forwards(config, rung, phase)
        for rung in config.ladder
        for number, phase in enumerate(rung.phases)
    }
    seconds = []
    for record in read_log(config.run_dir / "log.jsonl"):
        each = passes.get((record.get("rung", 0), record.get("phase", 0)))
        rate = record.get("images_per_second")
        if each and isinstance(rate, int | float) and rate > 0:
            seconds.append(1 / (rate * each))
    return statistics.median(seconds) if seconds else None
