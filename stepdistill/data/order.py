"""Which samples an update sees where pictures come in several sizes: those of one size, and every picture equally often.

An update is `group` samples. Each size has shuffled passes of its own, one after another without end, that its updates are
filled from. In the first p passes over all the data a size of c samples has floor(p c / group) updates: what fills no update
is carried into the next pass. So after p passes a sample of a size that has `group` samples or more was seen p or p - 1
times. A smaller size has one update in about group / c passes, and each of its samples is seen group / c times in it:
that is why `prepare` cuts such pictures to the nearest size that has enough (buckets.py).

All of it is a function of the update's number: the same after a stop, for any number of processes and micro-batches.
"""

from collections.abc import Mapping

from stepdistill import rng
from stepdistill.data.shards import Size


def samples_of_update(
    sizes: Mapping[Size, int], update: int, *, group: int, seed: int
) -> tuple[Size, list[int]]:
    """The size that update number `update` sees, and its samples by their numbers among those of that size, `group` of them.

    sizes: how many samples there are of each, at least one.
    """
    finished = _passes_before(sizes, update, group)
    first = {size: finished * count // group for size, count in sizes.items()}
    updates = {size: (finished + 1) * count // group - first[size] for size, count in sizes.items()}
    within, total = update - sum(first.values()), sum(updates.values())
    place = rng.dataset_rows([within], size=total, seed=rng.derive_seed(seed, "sizes", finished))[0]
    size, which = [(size, which) for size, count in updates.items() for which in range(count)][place]
    start = (first[size] + which) * group
    order = rng.derive_seed(seed, "size", *size)
    return size, rng.dataset_rows(list(range(start, start + group)), size=sizes[size], seed=order)


def _passes_before(sizes: Mapping[Size, int], update: int, group: int) -> int:
    """How many passes are over when this update comes: the most whose updates are no more than `update`."""
    samples = sum(sizes.values())
    # after p passes between p samples / group - len(sizes) and p samples / group updates are over
    low, high = update * group // samples, (update + len(sizes) + 1) * group // samples + 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(middle * count // group for count in sizes.values()) <= update:
            low = middle
        else:
            high = middle - 1
    return low
