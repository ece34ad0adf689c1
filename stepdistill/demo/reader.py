"""The readers: small CNNs that answer what an image of a world shows, such as the letter, the ink and the paper.

An image counts for prompt accuracy if all answers are right; a world's FID uses the 96 features. The weights of each world's
reader ship with the package; `pipelines/train_teacher.py` trains readers.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.demo import pairs
from stepdistill.demo.letters import IMAGE_SIZE, INKS, LETTERS, PAPERS, Triple
from stepdistill.messages import first_line

NUM_FEATURES = 96


@dataclass(frozen=True)
class Questions:
    """What a reader answers.

    image_size  side of the images, in pixels; a multiple of 8
    choices     for each question, the number of possible answers
    content     builds what a caption describes, a Triple or a Pair, from one answer to each question
    """

    image_size: int
    choices: tuple[int, ...]
    content: Callable[..., Any]


OF_LETTERS = Questions(IMAGE_SIZE, (len(LETTERS), len(INKS), len(PAPERS)), Triple)
OF_PAIRS = Questions(pairs.IMAGE_SIZE, pairs.CHOICES, pairs.Pair)
SHIPPED_READERS = {"reader": OF_LETTERS, "pairs_reader": OF_PAIRS}
"""The readers that ship with the package, by their `evaluation.features`, and what each answers."""
_FILES = {"reader": "reader", "pairs_reader": "pairs/reader"}


class Reader(nn.Module):
    """uint8 images (B, 3, S, S) -> features (B, 96) and logits for each question."""

    num_features = NUM_FEATURES

    def __init__(self, questions: Questions = OF_LETTERS) -> None:
        super().__init__()
        self.questions = questions
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
        side = questions.image_size // 8
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96 * side * side, NUM_FEATURES))
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, count) for count in questions.choices)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) -> float32 (B, 96)."""
        if images.dtype != torch.uint8:
            raise ValueError(f"the reader takes uint8 images in 0..255, got {images.dtype}")
        return self.trunk(images.to(next(self.parameters()).dtype) / 127.5 - 1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features, so that the reader can be passed to torchmetrics' FrechetInceptionDistance as `feature`."""
        return self.features(images)

    def logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        """uint8 (B, 3, S, S) -> logits, for each question (B, its choices)."""
        features = nn.functional.silu(self.features(images))
        return [head(features) for head in self.heads]

    def read(self, images: torch.Tensor) -> list[Any]:
        """The most likely content of each uint8 image (B, 3, H, W), of any size: a Triple or a Pair."""
        sized = _resized(images, self.questions.image_size)
        answers = torch.stack([logits.argmax(dim=1) for logits in self.logits(sized)], dim=1)
        return [self.questions.content(*row) for row in answers.tolist()]


def _resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 images (B, 3, side, side), as a teacher may draw a world's captions in another size."""
    if images.shape[-2:] == (side, side):
        return images
    resized = nn.functional.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def save_reader(reader: Reader, path: Path) -> None:
    """Writes the weights as fp16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in reader.state_dict().items()}, path)


def load_reader(path: Path, questions: Questions = OF_LETTERS) -> Reader:
    """The reader in float32, in eval mode, without gradients; ValueError if the file does not hold a reader's weights."""
    reader = Reader(questions)
    try:
        reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the weights of a reader of images of {questions.image_size} pixels with "
            f"{len(questions.choices)} answers: {first_line(error)}"
        ) from None
    return reader.eval().requires_grad_(False)


def reader_file(name: str = "reader") -> Path:
    """The weights of a reader that ships with the package, by its name in SHIPPED_READERS."""
    return Path(__file__).parent / "assets" / _FILES[name] / "model.fp16.safetensors"


def shipped_reader(name: str = "reader") -> Reader:
    """A reader that ships with the package, by its name in SHIPPED_READERS."""
    return load_reader(reader_file(name), SHIPPED_READERS[name])


@torch.no_grad()
def prompt_accuracy(batches: Iterable[torch.Tensor], asked: Sequence[Any], *, reader: Reader) -> float:
    """Share of uint8 images, in batches (B, 3, S, S), whose content is in all parts what was `asked` at the same index."""
    seen = [content for batch in batches for content in reader.read(batch)]
    return sum(a == b for a, b in zip(seen, asked, strict=True)) / len(seen)
