"""The reader: a small CNN that classifies the letter, ink and paper of a 32 x 32 image of the letters world.

An image counts for prompt accuracy if all three answers are right; the demo's FID uses the 96 features. The weights ship
with the package and were trained by `pipelines/train_teacher.py`.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.demo.letters import INKS, LETTERS, PAPERS, Triple
from stepdistill.messages import first_line

NUM_FEATURES = 96


class Reader(nn.Module):
    """uint8 images (B, 3, 32, 32) -> features (B, 96) and logits for 26 letters, 5 inks, 4 papers."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 24, 48, 96)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            blocks += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96 * 4 * 4, NUM_FEATURES))
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, len(kind)) for kind in (LETTERS, INKS, PAPERS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, 32, 32) -> float32 (B, 96)."""
        if images.dtype != torch.uint8:
            raise ValueError(f"the reader takes uint8 images in 0..255, got {images.dtype}")
        return self.trunk(images.to(next(self.parameters()).dtype) / 127.5 - 1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features, so that the reader can be passed to torchmetrics' FrechetInceptionDistance as `feature`."""
        return self.features(images)

    def logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        """uint8 (B, 3, 32, 32) -> logits [(B, 26), (B, 5), (B, 4)]."""
        features = nn.functional.silu(self.features(images))
        return [head(features) for head in self.heads]

    def read(self, images: torch.Tensor) -> list[Triple]:
        """The most likely letter, ink and paper of each image."""
        answers = torch.stack([logits.argmax(dim=1) for logits in self.logits(images)], dim=1)
        return [Triple(*row) for row in answers.tolist()]


def save_reader(reader: Reader, path: Path) -> None:
    """Writes the weights as fp16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in reader.state_dict().items()}, path)


def load_reader(path: Path) -> Reader:
    """The reader in float32, in eval mode, without gradients; ValueError if the file does not hold a reader's weights."""
    reader = Reader()
    try:
        reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the weights of the letters reader: {first_line(error)}"
        ) from None
    return reader.eval().requires_grad_(False)


def shipped_reader() -> Reader:
    """The reader that ships with the package."""
    return load_reader(Path(__file__).parent / "assets" / "reader" / "model.fp16.safetensors")


@torch.no_grad()
def prompt_accuracy(batches: Iterable[torch.Tensor], asked: Sequence[Triple], *, reader: Reader) -> float:
    """Share of uint8 images, in batches (B, 3, 32, 32), whose letter, ink and paper all match `asked` at the same index."""
    seen = [triple for batch in batches for triple in reader.read(batch)]
    return sum(a == b for a, b in zip(seen, asked, strict=True)) / len(seen)
