"""Which samples an update uses if images come in several sizes: samples of one size, and every image equally often.

An update takes `group` samples. Each size has an endless sequence of shuffled passes over its samples, from which its
updates are filled. In the first p passes over all the data, a size of c samples has floor(p c / group) updates; samples
that do not fill an update are carried into the next pass. So after p passes, a sample of a size with at least `group`
samples was seen p or p - 1 times. A smaller size has one update in about group / c passes, and that update uses each of its
samples group / c times: this is why `prepare` crops such images to the nearest size that has enough (buckets.py).

The order depends on the seed, `group` and the update's number alone: a resumed run gives the same samples, and so does any
split of the same `group` into processes and micro-batches.
"""

from collections.abc import Mapping

from stepdistill import rng
from stepdistill.data.shards import Size


def samples_of_update(
    sizes: Mapping[Size, int], update: int, *, group: int, seed: int
) -> tuple[Size, list[int]]:
    """The image size that update number `update` uses, and its `group` samples, numbered within that size.

    sizes: number of samples of each size, at least one size.
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
    """Number of complete passes before this update: the largest p whose passes have at most `update` updates."""
    samples = sum(sizes.values())
    # p passes have between p * samples / group - len(sizes) and p * samples / group updates
    low, high = update * group // samples, (update + len(sizes) + 1) * group // samples + 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(middle * count // group for count in sizes.values()) <= update:
            low = middle
        else:
            high = middle - 1
    return low
