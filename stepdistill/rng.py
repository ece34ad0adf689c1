"""Randomness by name: every draw is a function of (seed, what it is for, global sample index), nothing else.

So a resumed run, another micro-batch size and another number of processes see the same samples and the same noise.
"""

import functools
import hashlib

import torch

Key = int | str


def derive_seed(seed: int, *keys: Key) -> int:
    """A 63-bit seed from a run's seed and names such as ("8", "mse", 17, "noise"); equal keys, equal seed."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A CPU generator seeded by derive_seed: draws on the CPU are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def normal(shape: tuple[int, ...], indices: list[int], *, seed: int, keys: tuple[Key, ...]) -> torch.Tensor:
    """Standard normal (len(indices), *shape), float32; row i depends on seed, keys and indices[i] only."""
    return torch.stack([torch.randn(shape, generator=generator(seed, *keys, index)) for index in indices])


def uniform(indices: list[int], *, seed: int, keys: tuple[Key, ...]) -> torch.Tensor:
    """Uniform in [0, 1), (len(indices),), float64; entry i depends on seed, keys and indices[i] only."""
    draws = [(derive_seed(seed, *keys, index) >> 10) / 2**53 for index in indices]
    return torch.tensor(draws, dtype=torch.float64)


@functools.lru_cache(maxsize=4)  # 8 bytes a row each
def _epoch_order(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def dataset_rows(indices: list[int], *, size: int, seed: int) -> list[int]:
    """Which of `size` data rows the global sample indices use: one shuffled pass after another, no row twice in a pass."""
    return [int(_epoch_order(size, seed, index // size)[index % size]) for index in indices]
