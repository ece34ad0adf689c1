"""The GPUs that a plan knows: memory, arithmetic and bandwidth, from their makers' data sheets. No torch.

A kernel takes at least what its arithmetic and its memory traffic take at the rates that kernels of such sizes reach, and at
least the time to launch it:

    seconds = max(FLOP / (_OF_PEAK * peak), bytes / (_OF_BANDWIDTH * bandwidth), launch)

The two shares and the launch of 4 microseconds are assumptions from published measurements of large matrix products and
copies on these cards, not measurements of this package.
"""

import re
from dataclasses import dataclass, replace

from stepdistill.config import ConfigError

GIB = 2**30
_OF_PEAK, _OF_BANDWIDTH = 0.7, 0.85
_NEARLY = 0.25  # of a driver's memory to that of the card's name
_RESERVED_GIB = 0.8
"""What the driver, CUDA's context and the libraries take of a card's memory."""


@dataclass(frozen=True)
class Card:
    """One GPU.

    memory_gib  GiB that its driver reports: of a card that corrects errors (ECC), less than its name says
    half        peak of dense bfloat16 or float16 products with float32 sums, FLOP/s
    single      peak of float32 arithmetic, FLOP/s
    bandwidth   of its memory, bytes/s
    launch      seconds to start a kernel
    is_guess    only the memory was named, so the speed is that of a usual card of this size
    """

    name: str
    memory_gib: float
    half: float
    single: float
    bandwidth: float
    launch: float = 4e-6
    is_guess: bool = False

    @property
    def usable_gib(self) -> float:
        """The memory that tensors can take."""
        return self.memory_gib - _RESERVED_GIB

    def seconds(self, flop: float, moved: float, *, is_half: bool) -> float:
        """The least time of one kernel with so much arithmetic and memory traffic."""
        peak = self.half if is_half else self.single
        return max(flop / (_OF_PEAK * peak), moved / (_OF_BANDWIDTH * self.bandwidth), self.launch)


CARDS = {
    "h100": Card("H100 SXM", 79.6, 989e12, 67e12, 3.35e12),
    "h200": Card("H200", 140.4, 989e12, 67e12, 4.8e12),
    "a100": Card("A100 80 GB", 80, 312e12, 19.5e12, 2.04e12),
    "a100-40gb": Card("A100 40 GB", 40, 312e12, 19.5e12, 1.56e12),
    "l40s": Card("L40S", 45.0, 362e12, 91.6e12, 0.864e12),
    "a6000": Card("RTX A6000", 48, 155e12, 38.7e12, 0.768e12),
    "l4": Card("L4", 22.5, 121e12, 30.3e12, 0.3e12),
    "a10": Card("A10", 22.5, 125e12, 31.2e12, 0.6e12),
    "t4": Card("T4", 15.0, 65e12, 8.1e12, 0.32e12),
    "rtx5090": Card("RTX 5090", 32, 209e12, 105e12, 1.79e12),
    "rtx4090": Card("RTX 4090", 24, 165e12, 82.6e12, 1.008e12),
    "rtx4080": Card("RTX 4080", 16, 97.5e12, 48.7e12, 0.717e12),
    "rtx4070": Card("RTX 4070", 12, 58e12, 29.1e12, 0.504e12),
    "rtx4060": Card("RTX 4060", 8, 30e12, 15.1e12, 0.272e12),
    "rtx3090": Card("RTX 3090", 24, 71e12, 35.6e12, 0.936e12),
    "rtx3080": Card("RTX 3080", 10, 59.5e12, 29.8e12, 0.76e12),
    "rtx3060": Card("RTX 3060", 12, 25.5e12, 12.7e12, 0.36e12),
}
_BY_MEMORY = {8: "rtx4060", 10: "rtx3080", 12: "rtx4070", 16: "rtx4080", 24: "rtx4090", 32: "rtx5090"}
_BY_MEMORY |= {40: "a100-40gb", 48: "l40s", 80: "h100", 141: "h200"}


def card_of(text: str) -> Card:
    """The card of a name such as "h100", or a usual card for a size such as "24GB" or "24"; ConfigError otherwise."""
    name = _short(text)
    known = {_short(key): card for key, card in CARDS.items()}
    if name in known:
        return known[name]
    size = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*(gi?b)?", text.lower().strip())
    if size is not None and float(size[1]) >= 1:
        memory = float(size[1])
        usual = _usual(memory)
        name = f"a card of {memory:g} GB, as fast as {usual.name}"
        return replace(usual, name=name, memory_gib=memory, is_guess=True)
    raise ConfigError(f"--gpu: got {text!r}; allowed: {', '.join(CARDS)}, or a size such as 24GB")


def nearest_card(name: str, memory_gib: float) -> Card:
    """The card that a driver calls `name`, with the memory that it has; else a usual card of that size."""
    words = re.sub(
        r"(?<=[a-z])\s+(?=\d)", "", re.sub(r"nvidia|geforce", "", name.lower())
    )  # "rtx 4090" is one word
    known = [
        card
        for key, card in CARDS.items()
        if re.search(rf"\b{key.split('-')[0]}\b", words) and abs(card.memory_gib / memory_gib - 1) < _NEARLY
    ]
    card = min(known, key=lambda k: abs(k.memory_gib - memory_gib)) if known else _usual(memory_gib)
    return replace(card, name=name, memory_gib=memory_gib)


def _short(name: str) -> str:
    """A name without makers, spaces and hyphens, by which it can be written in several ways."""
    return re.sub(r"[\s_-]|nvidia|geforce", "", name.lower())


def _usual(memory_gib: float) -> Card:
    return CARDS[_BY_MEMORY[min(_BY_MEMORY, key=lambda known: (abs(known - memory_gib), known))]]
