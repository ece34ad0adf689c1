"""Device, precision and processes. Owns accelerate.

The network is not wrapped in DDP, which fails when adapters switch: gradients of what trained are averaged over the
processes in one flat all-reduce.
"""

import gc
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

WEIGHT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the base, by `training.mixed_precision`; what trains is float32 throughout."""
_ON_CPU = not torch.cuda.is_available()
"""Without cpu=True, accelerate ignores torchrun's processes on a CPU machine."""


class Runtime:
    """What the loop of a phase needs of its surroundings."""

    def __init__(self, *, mixed_precision: str = "no") -> None:
        # accelerate fixes one precision per process, and one process may run ladders of several
        self.accelerator = Accelerator(mixed_precision="no", cpu=_ON_CPU)
        self.device: torch.device = torch.device("cpu") if _ON_CPU else self.accelerator.device
        self.weight_dtype = WEIGHT_DTYPES[mixed_precision]
        # float16 has no room for small gradients: the loss is scaled up, and down again where one overflows
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.weight_dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """Matrix products in half precision where mixed precision is on; a context that changes nothing elsewhere."""
        half = self.weight_dtype != torch.float32
        dtype = self.weight_dtype if half else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=half)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes."""
        return self.accelerator.is_main_process

    @property
    def num_processes(self) -> int:
        """How many share the batch."""
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        """Which one this is."""
        return self.accelerator.process_index

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a scalar, of its scaled value in float16: `unscale` before they are used."""
        self.accelerator.backward(self._scaler.scale(loss))

    def unscale(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Brings the gradients of these optimisers back to their own size; an overflow stays, as inf or nan."""
        for optimizer in optimizers:
            self._scaler.unscale_(optimizer)

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite may mean no more than that the loss was scaled too far."""
        return self._scaler.is_enabled()

    def adapt_scale(self) -> None:
        """After each update, or each that was left out: half the scale where a gradient overflowed, more after a while."""
        self._scaler.update()

    def loss_scale_state(self) -> dict[str, Any]:
        """How far the loss is scaled now; empty outside float16."""
        return self._scaler.state_dict()

    def load_loss_scale_state(self, state: dict[str, Any]) -> None:
        """Goes on from `loss_scale_state`."""
        if state:
            self._scaler.load_state_dict(state)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its mean over the processes; parameters without one count as zero."""
        if self.num_processes == 1:
            return
        parameters = list(parameters)
        flat = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
        )
        flat = self.accelerator.reduce(flat, reduction="mean")
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def peak_memory(self) -> dict[str, float]:
        """Most bytes allocated on the GPU since this was last asked, for the log; empty on the CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_memory_bytes": float(peak)}

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


class Processes:
    """The processes of a launch, for work that has no gradients: each takes its share."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=_ON_CPU)
        self.device: torch.device = torch.device("cpu") if _ON_CPU else self._state.device

    @property
    def is_main(self) -> bool:
        """True in the one process that measures and writes."""
        return self._state.is_main_process

    @property
    def index(self) -> int:
        """Which one this is."""
        return self._state.process_index

    @property
    def count(self) -> int:
        """How many there are."""
        return self._state.num_processes

    def share(self, items: list[Any]) -> list[Any]:
        """This process's part of a list; every process must call it with the same list."""
        if len(items) < self._state.num_processes:
            return items[self._state.process_index :][:1]
        with self._state.split_between_processes(items) as mine:
            return list(mine)

    def wait(self) -> None:
        """Until every process is here."""
        self._state.wait_for_everyone()


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU: of everything outside the training loop."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Frees the models that nothing needs any more, on the GPU too. Cycles of references, such as the frames of an exception
    that a library caught, keep them until the garbage collector happens to run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def source_commit() -> str:
    """The commit of the checkout this package runs from, `-dirty` where files differ; "none" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.strip() or "none"


def environment() -> dict[str, str | int]:
    """Versions, commit and machine, for environment.json and the report."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "torchmetrics", "safetensors")
    return {
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: importlib.metadata.version(name) for name in packages},
    }
