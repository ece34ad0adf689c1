"""What CLIP says of images and prompts: PickScore and the nearest prompt, against transformers' own CLIP."""

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from stepdistill.evaluation.measure.features import (
    build_extractor,
    clip_score,
    extract_features,
    nearest_prompts,
    pick_score,
)
from tests.extractors import build_clip

PROMPTS = [
    "a red letter a on white",
    "a blue letter b",
    "a cat",
    "a purple letter m on pink and many more words",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(folder, extractor, uint8 images (4, 3, 32, 32), their embeddings)."""
    folder = build_clip(tmp_path_factory.mktemp("clip"))
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = build_extractor(f"clip:{folder}")
    return folder, extractor, images, extract_features(iter([images]), extractor, resize="pil_bicubic")


@pytest.fixture(scope="module")
def logits(clip):
    """transformers' logits (image, prompt): its scale times the cosines."""
    folder, _, images, _ = clip
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 12}
    with torch.no_grad():
        return model(**processor(text=PROMPTS, images=pictures, **options)).logits_per_image


def test_pickscore_is_the_scaled_cosine_of_image_and_prompt(clip, logits):
    _, extractor, _, embeddings = clip
    assert pick_score(extractor, embeddings, PROMPTS) == pytest.approx(float(logits.diag().mean()), rel=1e-4)


def test_clip_score_is_a_hundred_times_the_cosine(clip, logits):
    folder, extractor, images, _ = clip
    scale = float(CLIPModel.from_pretrained(folder).logit_scale.exp())
    expected = max(0.0, 100 * float(logits.diag().mean()) / scale)
    assert clip_score(extractor, iter([images]), PROMPTS) == pytest.approx(expected, abs=0.05)


def test_the_nearest_prompt_has_the_largest_cosine(clip, logits):
    _, extractor, _, embeddings = clip
    expected = [PROMPTS[k] for k in logits.argmax(dim=1)]
    assert nearest_prompts(extractor, embeddings, [*PROMPTS, *PROMPTS]) == expected


def test_another_extractor_reads_no_prompts(clip):
    with pytest.raises(ValueError, match="text embeddings need CLIP, got reader"):
        nearest_prompts(build_extractor("reader"), clip[3], PROMPTS)
