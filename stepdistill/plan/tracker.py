"""Counts what a computation would do on a GPU: live memory, kernels, arithmetic, memory traffic, time.

Tensors are on the meta device, which has shapes and dtypes and no values. Every operation is seen as the GPU would see it.
Memory is the sum of the storages that are alive, each rounded up to CUDA's 512 bytes. The working memory of libraries inside
a kernel is not counted.
"""

import functools
import importlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from stepdistill.plan.cards import Card

_OPTIMIZER: Any = importlib.import_module("torch.optim.optimizer")  # torch.optim hides it behind its class
_BLOCK = 512  # bytes; CUDA's allocator rounds up to it
_NO_KERNEL = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "detach",
        "alias",
        "slice",
        "select",
        "narrow",
    ),
    *(
        "unsqueeze",
        "squeeze",
        "as_strided",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "_reshape_alias",
        "unfold",
    ),
    *("lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device"),
}
"""Operations that start no kernel."""
_IN_PLACE = {"add_", "sub_", "mul_", "div_", "copy_", "zero_", "fill_", "clamp_", "lerp_"}
"""Operations that return their first input, changed."""


@dataclass
class Work:
    """What a part of a computation does.

    kernels; flop; moved: bytes read and written; cast: bytes of these in copies to another dtype
    seconds: the least time on the card, kernel by kernel
    """

    kernels: float = 0
    flop: float = 0.0
    moved: float = 0.0
    cast: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(a * factor for a in vars(self).values()))


@dataclass
class _Held:
    bytes: int
    label: str
    reference: Any


class Tracker(TorchDispatchMode):
    """While active, counts the operations and the live memory of meta tensors.

    card: gives the time of each kernel.
    label: names the part that an operation, and the memory that it takes, belongs to.

    work: by part. now: live bytes. peak, peak_parts: the most live bytes since `reset_peak`, and these by part.
    """

    def __init__(self, card: Card, *, label: Callable[[], str] = lambda: "all") -> None:
        super().__init__()
        self._card, self._label = card, label
        self._held: dict[int, _Held] = {}
        self._by_part: Counter[str] = Counter()
        self.work: dict[str, Work] = {}
        self.now = self.peak = 0
        self.peak_parts: dict[str, int] = {}

    def hold(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Counts tensors that exist already, or moves them to another part."""
        for tensor in tensors:
            self._hold(tensor, part, moves=True)

    def hold_bytes(self, count: int, part: str) -> None:
        """Counts memory that no tensor here stands for."""
        self._add(part, count)

    def reset_peak(self) -> None:
        """Begins to look for a new peak."""
        self.peak, self.peak_parts = self.now, dict(self._by_part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part = self._label()
        result, done = _run(func, args, kwargs or {})
        if done is not None:
            self._count(part, done)
        for tensor in _tensors(result):
            self._hold(tensor, part)
        return result

    def _count(self, part: str, done: "_Done") -> None:
        so_far = self.work.get(part, Work())
        self.work[part] = Work(
            kernels=so_far.kernels + 1,
            flop=so_far.flop + done.flop,
            moved=so_far.moved + done.moved,
            cast=so_far.cast + (done.moved if done.is_cast else 0),
            seconds=so_far.seconds + self._card.seconds(done.flop, done.moved, is_half=done.is_half),
        )

    def _hold(self, tensor: torch.Tensor, part: str, *, moves: bool = False) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        held = self._held.get(place)
        if held is None:
            size = math.ceil(storage.nbytes() / _BLOCK) * _BLOCK
            reference = weakref.ref(storage, functools.partial(self._drop, place))
            self._held[place] = _Held(size, part, reference)
            self._add(part, size)
        elif moves:
            self._by_part[held.label] -= held.bytes
            self._by_part[part] += held.bytes
            held.label = part

    def _add(self, part: str, size: int) -> None:
        self._by_part[part] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_parts = self.now, dict(self._by_part)

    def _drop(self, place: int, _reference: object) -> None:
        held = self._held.pop(place)
        self._by_part[held.label] -= held.bytes
        self.now -= held.bytes


@dataclass(frozen=True)
class _Done:
    """What a kernel does. flop; moved: bytes read and written; is_cast: it copies; is_half: it computes in 16 bits."""

    flop: float
    moved: int
    is_cast: bool
    is_half: bool


@dataclass(frozen=True)
class _Empty:
    """Describes a new meta tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


_KNOWN: dict[Any, tuple[Any, _Done | None]] = {}
"""What operations return and do, by operation and inputs."""


def _run(func: Any, args: Any, kwargs: Any) -> tuple[Any, _Done | None]:
    """What an operation on meta tensors returns and does; it does nothing if it starts no kernel.

    Both are computed once for equal inputs, because torch computes the result's shape in Python and a network repeats the
    same operations many times.
    """
    name = func.overloadpacket.__name__
    if name in _NO_KERNEL:
        return func(*args, **kwargs), None
    key = _key(func, args, kwargs) if not func._schema.is_mutable or name in _IN_PLACE else None
    if key is None:
        result = func(*args, **kwargs)
        return result, _done(func, args, kwargs, result)
    known = _KNOWN.get(key)
    if known is None:
        result = func(*args, **kwargs)
        known = _KNOWN[key] = tree_map(_described, result), _done(func, args, kwargs, result)
    described, done = known
    return args[0] if name in _IN_PLACE else _made(described), done


def _key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """An operation and its inputs; None if one of these is no plain meta tensor, or if there is none."""
    parts, seen = [func], dict[int, int]()
    described = func.namespace == "aten" and all(
        _describe(value, parts, seen) for value in (*args, *kwargs.items())
    )
    return tuple(parts) if described and seen else None


def _describe(value: Any, parts: list[Any], seen: dict[int, int]) -> bool:
    """Adds an input to a key: a tensor by its shape, strides and dtype, and by which input it is the same as."""
    if isinstance(value, torch.Tensor):
        if not (value.is_meta and type(value) in (torch.Tensor, torch.nn.Parameter)):
            return False
        parts += (value.shape, value.stride(), value.dtype, seen.setdefault(id(value), len(seen)))
        return True
    if isinstance(value, list | tuple):
        parts += (type(value), len(value))
        return all(_describe(item, parts, seen) for item in value)
    parts += (type(value), value)
    return True


def _done(func: Any, args: Any, kwargs: Any, result: Any) -> _Done | None:
    inputs = {id(t): t for t in _tensors((*args, *kwargs.values()))}
    written = _tensors(result) or _written(func, args)
    if not written:
        return None
    packet = func.overloadpacket
    flop = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    return _Done(
        flop=flop,
        moved=sum(map(_bytes, (*inputs.values(), *written))),
        is_cast=packet.__name__ in ("_to_copy", "copy_"),
        is_half=written[0].dtype in (torch.bfloat16, torch.float16),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a value, which is one, or nested lists and tuples with some."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _made(described: Any) -> Any:
    """New tensors in place of their descriptions."""
    return described.tensor() if isinstance(described, _Empty) else tree_map(_empty, described)


def _written(func: Any, args: Any) -> list[torch.Tensor]:
    """The inputs that an operation changes, such as Adam's moments."""
    pairs = zip(func._schema.arguments, args, strict=False)
    changed = [value for argument, value in pairs if argument.alias_info and argument.alias_info.is_write]
    return _tensors(changed)


def _described(value: Any) -> Any:
    return _Empty(value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _empty(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Empty) else value


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Inside it, meta tensors take the ways that CUDA tensors take: one kernel for attention, one for an Adam step."""
    attention = functional.scaled_dot_product_attention
    devices = _OPTIMIZER._get_fused_kernels_supported_devices

    def one_kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if query.device.type in ("cpu", "cuda") or args:
            return attention(query, key, value, *args, **kwargs)
        mask = kwargs.get("attn_mask")
        if query.dtype == torch.float32 or mask is not None:
            call = torch.ops.aten._scaled_dot_product_efficient_attention
            # a mask becomes a bias of its own small shape, and the kernel reads that several times
            shape = (*query.shape[:-1], key.shape[-2])
            bias = None if mask is None else mask.to(query.dtype).expand(shape)
            return call(query, key, value, bias, torch.is_grad_enabled())[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    functional.scaled_dot_product_attention = one_kernel
    _OPTIMIZER._get_fused_kernels_supported_devices = lambda: [*devices(), "meta"]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
        _OPTIMIZER._get_fused_kernels_supported_devices = devices
