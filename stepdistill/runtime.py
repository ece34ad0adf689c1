"""Device, precision and processes. The only file that imports accelerate.

The network is not wrapped in DDP, which fails when adapters are switched. Instead the flat gradient of each role's trained
weights is averaged over the processes in one all-reduce.
"""

import gc
import importlib.metadata
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size

from stepdistill import launch
from stepdistill.launch import collective

WEIGHT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type in which the network computes, by `training.mixed_precision`; the masters of trained weights are float32."""
_ON_CPU = not torch.cuda.is_available()
"""Without cpu=True, accelerate ignores torchrun's processes on a CPU machine."""
_MAX_SECONDS_UNSEEN = 10.0  # until a new file is visible on the other machines of a shared file system


class Runtime:
    """Device, precision and processes for the training loop of a phase."""

    def __init__(self, *, mixed_precision: str = "no") -> None:
        # "no" here: accelerate allows one precision per process, but a process may run ladders of different precisions
        self.accelerator = Accelerator(mixed_precision="no", cpu=_ON_CPU)
        self.device: torch.device = torch.device("cpu") if _ON_CPU else self.accelerator.device
        self.weight_dtype = WEIGHT_DTYPES[mixed_precision]
        # small gradients vanish in float16, so the loss is scaled up, and down again after an overflow
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.weight_dtype == torch.float16)
        self._first_loss_scale = self._scaler.state_dict()

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.accelerator.is_main_process

    @property
    def num_processes(self) -> int:
        """How many processes share an update's samples."""
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        """The number of this process, from 0."""
        return self.accelerator.process_index

    def backward(self, loss: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Backward pass of a scalar loss. With float16 the loss is scaled: call `unscale` before the gradients are used."""
        # accelerate's would divide by the accumulation steps of its own settings
        self._scaler.scale(loss).backward(retain_graph=retain_graph)

    @property
    def loss_scale(self) -> float:
        """What `backward` multiplies losses by: 1 but in float16, where reading it waits for the device."""
        return self._scaler.get_scale()

    def unscale(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Divides the gradients of these optimisers by the loss scale; an overflow stays inf or nan."""
        for optimizer in optimizers:
            self._scaler.unscale_(optimizer)

    @property
    def may_overflow(self) -> bool:
        """Whether a non-finite gradient may only mean that the loss scale was too large."""
        return self._scaler.is_enabled()

    def adapt_scale(self) -> None:
        """Call after each update, even a skipped one: lowers the loss scale after an overflow, raises it after a while."""
        self._scaler.update()

    def reset_loss_scale(self) -> None:
        """Call at the start of each rung, so that its updates do not depend on those of earlier rungs."""
        self.load_loss_scale_state(self._first_loss_scale)

    def loss_scale_state(self) -> dict[str, Any]:
        """State of the loss scale; empty without float16."""
        return self._scaler.state_dict()

    def load_loss_scale_state(self, state: dict[str, Any]) -> None:
        """Restores what `loss_scale_state` returned."""
        if state:
            self._scaler.load_state_dict(state)

    def average_gradient(self, master: torch.nn.Parameter) -> None:
        """Replaces the gradient by its mean over the processes."""
        if self.num_processes == 1:
            return
        assert master.grad is not None, "a role's optimiser holds its gradient"
        with collective():
            master.grad.copy_(self.accelerator.reduce(master.grad, reduction="mean"))

    def average_scalars(self, scalars: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The means of scalars over the processes, in one operation that the CPU does not wait for on a GPU; every process
        must pass the same names in the same order. With one process, the scalars themselves."""
        if self.num_processes == 1:
            return scalars
        flat = torch.stack([scalar.detach().double() for scalar in scalars.values()])
        with collective():
            flat = self.accelerator.reduce(flat, reduction="mean")
        return dict(zip(scalars, flat.unbind(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of a number's values over the processes, for decisions that all of them must make alike."""
        if self.num_processes == 1:
            return number
        with collective():
            return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def is_same(self, number: int) -> bool:
        """Whether a number has the same value in all processes."""
        return self.largest(number) == -self.largest(-number)

    def peak_memory(self) -> dict[str, float]:
        """Peak bytes allocated on the GPU since the last call, under the log's key; empty on the CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_memory_bytes": float(peak)}

    def wait(self) -> None:
        """Waits until every process has called this."""
        with collective():
            self.accelerator.wait_for_everyone()


class Processes:
    """The processes of a launch, for work without gradients that they share."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=_ON_CPU)
        self.device: torch.device = torch.device("cpu") if _ON_CPU else self._state.device

    @property
    def is_main(self) -> bool:
        """True in the one process that measures and writes files."""
        return self._state.is_main_process

    @property
    def index(self) -> int:
        """The number of this process, from 0."""
        return self._state.process_index

    @property
    def count(self) -> int:
        """The number of processes."""
        return self._state.num_processes

    def share(self, items: list[Any]) -> list[Any]:
        """This process's part of a list; every process must call this with the same list."""
        if len(items) < self._state.num_processes:
            return items[self._state.process_index :][:1]
        with self._state.split_between_processes(items) as mine:
            return list(mine)

    def wait(self) -> None:
        """Waits until every process has called this."""
        with collective():
            self._state.wait_for_everyone()

    def check_shared(self, folder: Path) -> None:
        """ValueError, in all processes, if one of them does not see what the main process writes into the folder."""
        if self.count == 1:
            return
        nonce, place = self.broadcast((uuid.uuid4().int, str(folder.absolute())))
        mark = folder / f".shared.{nonce}.partial"
        if self.is_main:
            mark.touch()
        self.wait()
        until = time.monotonic() + _MAX_SECONDS_UNSEEN
        while not (seen := mark.exists()) and time.monotonic() < until:
            time.sleep(0.1)
        blind = [self.broadcast(None if seen else socket.gethostname(), source=n) for n in range(self.count)]
        if self.is_main:
            mark.unlink(missing_ok=True)
        for number, host in enumerate(blind):
            if host is not None:
                raise ValueError(
                    f"output_dir: process {number}, on {host}, does not see what process 0 writes into {place}; "
                    f"allowed: a folder that all machines of the launch share; fix: output_dir=... on a shared file system"
                )

    def broadcast(self, value: Any, *, source: int = 0) -> Any:
        """The value that process number `source` passes, in all processes."""
        if self.count == 1:
            return value
        with collective():
            return broadcast_object_list([value], from_process=source)[0]


def meet(run_dir: Path, *, timeout_minutes: float, release: Callable[[], None]) -> None:
    """Lets the processes of a launch meet, before their first common work; later calls change nothing.

    run_dir: the run's folder, which all processes must share; ValueError if they do not.
    timeout_minutes: how long they wait for one that does not answer; then DistributedError.
    release: gives back what this process holds, such as the folder's lock, if it must end at once because another failed.
    """
    if launch.is_joined():
        return
    timeout = timedelta(minutes=timeout_minutes)
    with collective():
        start, store = launch.name_start(timeout)
        if store:  # before PartialState, which meets in a store that may hold addresses of ended processes
            torch.distributed.init_process_group("gloo" if _ON_CPU else "nccl", timeout=timeout, **store)
        PartialState(cpu=_ON_CPU, timeout=timeout)
    processes = Processes()
    if store and processes.count != store["world_size"]:
        raise ValueError(
            f"WORLD_SIZE is {store['world_size']} in the environment, but accelerate sees {processes.count} process; fix: "
            f"set LOCAL_RANK too, the number of the process on its machine, as docs/cluster.md does"
        )
    if processes.count > 1:
        launch.join(start or processes.broadcast(uuid.uuid4().hex), release=release)
        processes.check_shared(run_dir)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def default_device() -> torch.device:
    """The device for everything outside the training loop: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Frees models that are no longer used, also on the GPU. Otherwise reference cycles, such as the frames of an exception
    that a library caught, keep them alive until the garbage collector runs by chance."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def source_commit() -> str:
    """The git commit that this package runs from, with `-dirty` if files differ from it; "none" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.strip() or "none"


def environment() -> dict[str, str | int]:
    """Package versions, commit and machine, for environment.json and the report."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "torchmetrics", "safetensors")
    return {
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: importlib.metadata.version(name) for name in packages},
    }
