"""The overhead of this package, and on a GPU the time and memory of real updates at full size.

    python eval/bench.py [CONFIG] [--only NAME ...] [--iterations 8] [--minutes M] [--output eval/results/bench.json]

gpu         on a CUDA GPU: two updates of each kind of phase at full size, eager and compiled, beside their plan
rows        an iteration of each kind of phase against its U-Net passes alone
waiting     the share of training that waits for data
preparing   preparing photograph-sized JPEGs against a VAE of Stable Diffusion's size alone
host        what Python takes for SDXL's modules: a role switch, passes, with and without recomputation
lcm         an update against the training loop of diffusers' LCM-LoRA script, with its loss
checkpoint  how long a checkpoint stops training
processes   two processes against one
leaks       memory and tensors gained per update

The file is written after each part, and after each row of gpu. No part is begun after M minutes (default: 8 with a GPU).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_cost import measured as checkpoint_measured
from timing.data import preparing, waiting
from timing.host import host
from timing.iterations import iterations
from timing.lcm_loop import lcm_loop
from timing.leaks import leaks
from timing.on_gpu import BLOCKS, on_gpu
from timing.processes import processes

from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.data.prepare import prepare
from stepdistill.plan.whole_run import card_here
from stepdistill.runtime import environment
from stepdistill.stages import open_run

_MINUTES_WITH_GPU = 8.0
_LEAK_UPDATES = 60


class Parts:
    """The parts by name; each is called once, and yields what is known so far of its result.

    Args:
        config_path, overrides: the small run on which everything but "gpu" is measured.
        scratch: a folder for it.
        count: rounds of each timing.
        deadline: time.monotonic() after which "gpu" begins no row.
    """

    def __init__(
        self, config_path: str, overrides: list[str], scratch: Path, *, count: int, deadline: float
    ) -> None:
        self._path, self._scratch, self._count, self._deadline = config_path, scratch, count, deadline
        self._overrides = [f"output_dir={scratch}/runs", "data.num_images=128", *overrides]
        self._config: RunConfig | None = None

    @property
    def config(self) -> RunConfig:
        """The small run, prepared."""
        if self._config is None:
            self._config = load_config(self._path, self._overrides)
            open_run(self._config)
            prepare(self._config)
        return self._config

    def gpu(self) -> Iterator[Any]:
        """Empty without a GPU."""
        card, rows = card_here(), list[dict[str, Any]]()
        if card is None:
            return
        for name, compiles in BLOCKS:
            for row in on_gpu(card, name, compiles, []):
                rows.append(row)
                yield rows
                if time.monotonic() > self._deadline:
                    return

    def all(self) -> dict[str, Callable[[], Iterator[Any]]]:
        """In the order in which they are measured."""

        def once(action: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
            return lambda: iter([action()])

        count = self._count
        return {
            "gpu": self.gpu,
            "rows": once(lambda: iterations(self.config, count)),
            "waiting": once(lambda: waiting(self.config, max(count, 4))),
            "preparing": once(lambda: preparing(self._scratch / "preparing")),
            "host": once(lambda: host(count)),
            "lcm": once(lambda: lcm_loop(self.config, count)),
            "checkpoint": once(
                lambda: checkpoint_measured(self.config, self._scratch / "checkpoints", count)
            ),
            "processes": once(lambda: self._processes(count)),
            "leaks": once(lambda: leaks(self.config, _LEAK_UPDATES)),
        }

    def _processes(self, count: int) -> dict[str, float]:
        _ = self.config  # prepared before the processes read it
        return processes(self._path, self._overrides, count)


PARTS = ("gpu", "rows", "waiting", "preparing", "host", "lcm", "checkpoint", "processes", "leaks")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measures this package's overhead, and real updates on a GPU."
    )
    parser.add_argument("config", nargs="?", default="configs/letters.yaml")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    minutes = args.minutes or (_MINUTES_WITH_GPU if torch.cuda.is_available() else float("inf"))
    deadline = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(args.config, args.overrides, Path(scratch), count=args.iterations, deadline=deadline)
        for name, part in parts.all().items():
            if name not in args.only:
                continue
            if time.monotonic() > deadline:
                print(f"{name}: no time left of {minutes:g} minutes")
                continue
            for result in part():
                results[name] = result
                if args.output:
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    args.output.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{name}: {json.dumps(results.get(name), indent=2)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
