"""Named randomness: every draw depends only on the seed, on keys that say what it is for, and on the global sample index.

So sample n has the same noise after a resume, in any micro-batch, and on any number of processes.
"""

import functools
import hashlib

import torch

Key = int | str


def derive_seed(seed: int, *keys: Key) -> int:
    """A 63-bit seed from a run's seed and keys such as (8, 0, "mse", "noise", 17); equal keys, equal seed."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A CPU generator seeded by derive_seed; it is on the CPU so that draws do not depend on the training device."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def normal(shape: tuple[int, ...], indices: list[int], *, seed: int, keys: tuple[Key, ...]) -> torch.Tensor:
    """Standard normal (len(indices), *shape), float32; row i depends on seed, keys and indices[i] only."""
    return torch.stack([torch.randn(shape, generator=generator(seed, *keys, index)) for index in indices])


def uniform(indices: list[int], *, seed: int, keys: tuple[Key, ...]) -> torch.Tensor:
    """Uniform in [0, 1), (len(indices),), float64; entry i depends on seed, keys and indices[i] only."""
    draws = [(derive_seed(seed, *keys, index) >> 10) / 2**53 for index in indices]
    return torch.tensor(draws, dtype=torch.float64)


@functools.lru_cache(maxsize=4)  # each holds 8 bytes per row
def _epoch_order(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def dataset_rows(indices: list[int], *, size: int, seed: int) -> list[int]:
    """The data rows (of `size`) for these global sample indices: one shuffled pass after another, each row once per pass."""
    return [int(_epoch_order(size, seed, index // size)[index % size]) for index in indices]
