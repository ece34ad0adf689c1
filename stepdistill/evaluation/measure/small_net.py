"""A small feature extractor for FID if no large one is available; it is trained without labels, in minutes on a CPU.

It learns two tasks. The first is to find an image in a batch by another crop of it: instance discrimination (Wu et al.
2018, arXiv 1805.01978) with SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, Eq 1), which needs features of the content.
The second is to classify the damage to an image (DAMAGES), as Gidaris et al. 2018 (arXiv 1803.07728) and Zhang et al.
2019 (arXiv 1901.04596) classify rotations and warps.

SimCLR's views are also blurred and recoloured, which makes features blind to such damage; here the views differ by crops
only. Features learned without labels measure generators well (Morozov, Voynov and Babenko 2021, ICLR), and so do features
learned from images of the kind that is measured (Cetin et al. 2024, arXiv 2406.18430).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, normalize

from stepdistill.disk.durable import canonical, read_sealed, sha256_file, write_bytes, write_sealed
from stepdistill.messages import first_line

WEIGHTS, RECORD = "model.safetensors", "extractor.json"
SIDES = (32, 64, 128)
NUM_FEATURES = 128
DAMAGES = ("none", "blur", "noise", "two at once", "parts exchanged", "colours moved")
_TEMPERATURE = 0.2
_SMALLEST_CROP = 0.6  # share of a side
_DAMAGE_WEIGHT = 0.5
_EMBEDDING = 64


@dataclass(frozen=True)
class TrainingSettings:
    """Training settings: number of updates, batch size, AdamW's learning rate (with cosine decay to 0) and seed."""

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of both tasks on validation images.

    found_again   share of images that are found by another crop among `among` images
    damage_named  share of damages that are classified correctly
    """

    found_again: float
    among: int
    damage_named: float


class SmallNet(nn.Module):
    """Images (B, 3, side, side) in -1..1 -> features (B, 128); after training each has a variance of about 1."""

    scale: torch.Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        stride = 4 if side > 64 else 2
        blocks: list[nn.Module] = [nn.Conv2d(3, 24, 2 * stride + 1, stride=stride, padding=stride)]
        channels, width = 24, side // stride
        while True:
            blocks += [nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
            blocks += [nn.GroupNorm(8, channels), nn.SiLU()]
            if width == 4:
                break
            wider = min(128, 2 * channels)
            blocks.append(nn.Conv2d(channels, wider, 3, stride=2, padding=1))
            channels, width = wider, width // 2
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels * 16, NUM_FEATURES))
        self.register_buffer("scale", torch.ones(NUM_FEATURES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) -> (B, 128)."""
        return self.trunk(images) * self.scale


class _Heads(nn.Module):
    """The heads of the two tasks on top of the features; discarded after training."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, _EMBEDDING))
        self.damage = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, len(DAMAGES)))


def side_for(size: tuple[int, int]) -> int:
    """The side, 32, 64 or 128 pixels, that images of (height, width) are resized to."""
    return next((side for side in SIDES if max(size) <= side), SIDES[-1])


def train_small_net(
    images: torch.Tensor,
    kept_apart: torch.Tensor,
    settings: TrainingSettings,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
) -> tuple[SmallNet, Accuracy]:
    """Trains a net; returns it with its accuracy on validation images.

    The same images and settings give the same bits on one machine with the same number of threads.

    Args:
        images: training images, uint8 (N, 3, side, side).
        kept_apart: validation images, uint8 (M, 3, side, side).
        settings: training settings.
        progress: called after every update with its number, from 1, and its loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net, heads = SmallNet(images.shape[-1]), _Heads()
    draws = torch.Generator().manual_seed(settings.seed)
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step, rows in enumerate(_batches(len(images), settings, draws), 1):
        batch = _floats(images[rows])
        again, damage = _losses(net, heads, batch, draws)
        loss = again + _DAMAGE_WEIGHT * damage
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        progress(step, loss.item())
    net.eval().requires_grad_(False)
    with torch.no_grad():
        features = torch.cat([net(_floats(part)) for part in images[:2048].split(256)])
        net.scale.div_(features.std(dim=0).clamp(min=1e-6))
        return net, _measure(net, heads, kept_apart, torch.Generator().manual_seed(settings.seed))


def _batches(count: int, settings: TrainingSettings, draws: torch.Generator) -> Iterator[torch.Tensor]:
    """The image indices of each update, from passes over all images in random order."""
    size, order = min(settings.batch_size, count), torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(count, generator=draws)
        yield order[:size]
        order = order[size:]


def _floats(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def _losses(
    net: SmallNet, heads: _Heads, batch: torch.Tensor, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    kinds = torch.randint(len(DAMAGES), (len(batch),), generator=draws)
    views = torch.cat([_crop(batch, draws), _crop(batch, draws), damaged(batch, kinds, draws)])
    features = net(views)
    first, second, third = features.chunk(3)
    pair = normalize(heads.again(torch.cat([first, second])), dim=1)
    similar = pair @ pair.T / _TEMPERATURE
    similar.fill_diagonal_(-1e9)
    count = len(batch)
    partner = torch.cat([torch.arange(count, 2 * count), torch.arange(count)])
    return cross_entropy(similar, partner), cross_entropy(heads.damage(third), kinds)


def _crop(batch: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """A random crop of each image, with 0.6 to 1 of its side, resized to the full side."""
    count = len(batch)
    share = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * torch.rand(count, 1, generator=draws)
    middle = (2 * torch.rand(count, 2, generator=draws) - 1) * (1 - share)
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = share[:, 0]
    turn[:, :, 2] = middle
    grid = nn.functional.affine_grid(turn, list(batch.shape), align_corners=False)
    return nn.functional.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)


def damaged(batch: torch.Tensor, kinds: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """The images (B, 3, S, S) in -1..1, each with the damage DAMAGES[kind] at a random strength; kinds (B,)."""
    made = batch.clone()
    for kind, name in enumerate(DAMAGES):
        rows = (kinds == kind).nonzero()[:, 0]
        if name != "none" and len(rows):
            made[rows] = _DAMAGE[name](batch, rows, draws)
    return made.clamp(-1, 1)


def _between(low: float, high: float, count: int, draws: torch.Generator) -> torch.Tensor:
    return (low + (high - low) * torch.rand(count, generator=draws)).view(-1, 1, 1, 1)


def _blur(batch: torch.Tensor, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    soft = avg_pool2d(batch[rows], 3, stride=1, padding=1, count_include_pad=False)
    softer = avg_pool2d(soft, 3, stride=1, padding=1, count_include_pad=False)
    share = _between(0, 1, len(rows), draws)
    return share * soft + (1 - share) * softer


def _noise(batch: torch.Tensor, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    grain = torch.randn(batch[rows].shape, generator=draws)
    return batch[rows] + _between(0.05, 0.4, len(rows), draws) * grain


def _two_at_once(batch: torch.Tensor, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    other = batch[(rows + 1 + torch.randint(len(batch) - 1, rows.shape, generator=draws)) % len(batch)]
    share = _between(0.3, 0.7, len(rows), draws)
    return share * batch[rows] + (1 - share) * other


def _parts_exchanged(batch: torch.Tensor, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Cuts each image in two at a random row or column and exchanges the parts."""
    side, made = batch.shape[-1], []
    for row in rows.tolist():
        axis, at = (
            torch.randint(2, (1,), generator=draws),
            torch.randint(side // 4, 3 * side // 4, (1,), generator=draws),
        )
        made.append(batch[row].roll(int(at), dims=1 + int(axis)))
    return torch.stack(made)


def _colours_moved(batch: torch.Tensor, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    shift = torch.randn(len(rows), 3, 1, 1, generator=draws)
    return batch[rows] + _between(0.1, 0.4, len(rows), draws) * shift


_DAMAGE = {
    "blur": _blur,
    "noise": _noise,
    "two at once": _two_at_once,
    "parts exchanged": _parts_exchanged,
    "colours moved": _colours_moved,
}


def _measure(net: SmallNet, heads: _Heads, kept_apart: torch.Tensor, draws: torch.Generator) -> Accuracy:
    batch = _floats(kept_apart)
    first, second = (normalize(heads.again(net(_crop(batch, draws)) / net.scale), dim=1) for _ in range(2))
    again = (first @ second.T).argmax(dim=1) == torch.arange(len(batch))
    kinds = torch.randint(len(DAMAGES), (len(batch),), generator=draws)
    named = heads.damage(net(damaged(batch, kinds, draws)) / net.scale).argmax(dim=1) == kinds
    return Accuracy(again.float().mean().item(), len(batch), named.float().mean().item())


def write_small_net(folder: Path, net: SmallNet, about: Mapping[str, Any]) -> None:
    """Writes model.safetensors, then extractor.json with `about`, the net's side and the sha256 of the weights."""
    content = canonical(save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}))
    write_bytes(folder / WEIGHTS, content)
    write_sealed(folder / RECORD, {**about, "side": net.side, "sha256": hashlib.sha256(content).hexdigest()})


def read_small_net(folder: Path) -> tuple[SmallNet, str]:
    """The net written by `write_small_net`, without gradients, and its sha256; ValueError if the folder has none."""
    record = read_sealed(folder / RECORD) or {}
    side, sha256 = record.get("side"), record.get("sha256")
    try:
        if side not in SIDES or sha256_file(folder / WEIGHTS) != sha256:
            raise ValueError(f"{WEIGHTS} and {RECORD} are not as they were written")
        net = SmallNet(side)
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"evaluation.features: cannot read the trained extractor in {folder}: {first_line(error)}; allowed: trained, or "
            f"trained:FOLDER of another run's evaluation/extractor"
        ) from None
    return net.eval().requires_grad_(False), sha256
