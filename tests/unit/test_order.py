"""The order of images in several sizes: one size per update, and every image equally often."""

import collections

import numpy as np
import pytest

from stepdistill.config import Data
from stepdistill.data.buckets import Sizes
from stepdistill.data.cache import LatentCache
from stepdistill.data.order import samples_of_update


class Numbers(LatentCache):
    """A cache that returns sizes and numbers in place of samples."""

    def __init__(self, sizes):
        self.sizes = sizes

    def samples(self, size, numbers):
        return [(size, number) for number in numbers]


def photographs(count):
    """Heights and widths like those of a camera roll with a few panoramas."""
    generator = np.random.default_rng(0)
    ratios = generator.choice([3 / 2, 2 / 3, 4 / 3, 3 / 4, 1.0, 16 / 9, 2.1, 0.45], count, p=PARTS)
    return collections.Counter((1500, round(1500 * ratio)) for ratio in ratios)


PARTS = (0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01)


def sdxl():
    return Sizes(Data(buckets=True), teacher_size=(1024, 1024), multiple=32)


@pytest.mark.parametrize("group", [64, 512])
def test_every_image_is_seen_equally_often_in_sdxls_buckets(group):
    """After each of 40 passes over 1,000 images, the counts of any two images differ by at most 1."""
    images, every = photographs(1000), sdxl()
    assert len(every.all) == 11
    assert min(every.tally(images).values()) < 64 <= max(every.tally(images).values())
    sizes = every.without_small(images, least=group).tally(images)
    assert sum(sizes.values()) == 1000
    assert min(sizes.values()) >= group
    cache = Numbers(dict(sorted(sizes.items())))
    counts = collections.Counter({(size, k): 0 for size, count in sizes.items() for k in range(count)})
    update = 0
    for passes in range(1, 41):
        while update < sum(passes * count // group for count in sizes.values()):
            drawn = cache.draw(list(range(update * group, update * group + group)), seed=7, group=group)
            assert len({size for size, _ in drawn}) == 1
            counts.update(drawn)
            update += 1
        assert max(counts.values()) - min(counts.values()) <= 1
        assert passes - 1 <= min(counts.values())
        assert max(counts.values()) <= passes
    assert update == pytest.approx(40 * 1000 / group, abs=len(sizes))


def test_images_of_small_buckets_go_to_the_nearest_bucket_with_enough():
    images, every = photographs(1000), sdxl()
    used = every.without_small(images, least=64)
    panorama = (1500, 3150)
    assert every.of(panorama) == (736, 1440)
    assert used.of(panorama) == (832, 1248)
    assert every.of((1500, 1500)) == used.of((1500, 1500)) == (1024, 1024)
    assert every.without_small(images, least=1).all == every.all
    assert len(every.without_small(images, least=2000).tally(images)) == 1
    assert every.without_small({}, least=64).all == every.all


@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        ({(8, 8): 400, (8, 16): 100, (16, 8): 301}, 64),
        ({(8, 8): 3, (8, 16): 997}, 64),
        ({(8, 8): 5, (8, 16): 6}, 512),
    ],
)
def test_each_size_has_its_share_of_updates(sizes, group):
    """Over many passes, even a size with fewer samples than one update takes gets its share of the updates."""
    total = 120 if group == 64 else 300
    counts = collections.Counter(samples_of_update(sizes, u, group=group, seed=1)[0] for u in range(total))
    for size, count in sizes.items():
        assert abs(counts[size] - total * count / sum(sizes.values())) <= len(sizes)


def test_the_samples_of_an_update_depend_only_on_its_number_and_the_seed():
    sizes = {(8, 8): 400, (8, 16): 100, (16, 8): 301}
    forth = [samples_of_update(sizes, u, group=16, seed=1) for u in range(120)]
    back = [samples_of_update(sizes, u, group=16, seed=1) for u in reversed(range(120))]
    assert forth == back[::-1]
    assert forth != [samples_of_update(sizes, u, group=16, seed=2) for u in range(120)]
    order = [size for size, _ in forth]
    assert order != sorted(order)
