"""Two processes against one, with as many samples and threads in each: what sharing an update costs.

Each process makes the same updates here; training's own launch, `torch.distributed.run`, starts them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from stepdistill.config import Phase, RunConfig
from stepdistill.config.load import load_config
from stepdistill.runtime import Runtime
from stepdistill.training.micro_batches import MicroBatches
from stepdistill.training.phase import update

from .clock import median_seconds
from .phases import phase_state

_LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def processes(config_path: str, overrides: list[str], count: int) -> dict[str, float]:
    """Median seconds of an update by one process and by two, and the ratio of the samples per second of two to one."""
    one, two = (_launched(number, config_path, overrides, count) for number in (1, 2))
    return {
        "one_seconds": round(one, 4),
        "two_seconds": round(two, 4),
        "speed_of_two": round(2 * one / two, 3),
    }


def _launched(number: int, config_path: str, overrides: list[str], count: int) -> float:
    """Median seconds of an update by `number` processes with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        command = [sys.executable, *_LAUNCH, str(number), "-m", "timing.processes", str(output), str(count)]
        subprocess.run(
            [*command, config_path, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            check=True,
            capture_output=True,
        )
        return float(json.loads(output.read_text()))


def _worker(output: Path, count: int, config: RunConfig) -> None:
    runtime = Runtime()
    phase = Phase(objective="mse", max_train_steps=10_000)
    setup, state = phase_state(config, 1, phase, runtime)
    batches = MicroBatches(setup, runtime)
    seconds = median_seconds(lambda: update(setup, state, batches, runtime), count)
    batches.close()
    if runtime.is_main:
        output.write_text(json.dumps(seconds))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), load_config(sys.argv[3], sys.argv[4:]))
