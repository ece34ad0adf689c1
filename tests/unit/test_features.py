"""Feature extractors: tiny models of the real classes, with random weights, saved and loaded as a user's files are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Model,
)

from stepdistill.config import Evaluation
from stepdistill.disk.durable import sha256_file
from stepdistill.evaluation.measure.feature_files import INCEPTION_VARIABLE
from stepdistill.evaluation.measure.features import build_extractor, clip_score, extract_features
from stepdistill.evaluation.measure.image_sets import Distances
from tests.conftest import randn
from tests.extractors import build_clip, build_dinov2


def images(n=5, size=40, seed=0):
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


class Layers(nn.Module):
    """Stands for the layers of the Inception file: (B, 3, 299, 299) in -1..1 -> (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) @ self.weight


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - 128) / 128)


@pytest.fixture
def scripted(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Scripted()).save(str(path))
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return build_dinov2(tmp_path_factory.mktemp("dinov2"))


def test_features_do_not_depend_on_the_batch_size(clip_folder):
    extractor = build_extractor(f"clip:{clip_folder}")
    x = images(9)
    features = extract_features([x], extractor, resize="pil_bicubic")
    parts = extract_features(x.split(4), extractor, resize="pil_bicubic", batch_size=3)
    assert features.shape == (9, 8)
    assert torch.allclose(features, parts, atol=1e-6)


def test_clip_and_dinov2_features_equal_those_of_transformers_own_preprocessing(clip_folder, dinov2_folder):
    """The images already have the right size, so only scaling and normalisation remain."""
    x = images(3, size=32)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        pixels = processor(list(x), return_tensors="pt")["pixel_values"]
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    extractor = build_extractor(f"clip:{clip_folder}")
    assert torch.allclose(extract_features([x], extractor, resize="none"), expected, atol=1e-5)
    x = images(3, size=28)
    model = Dinov2Model.from_pretrained(dinov2_folder)
    with torch.no_grad():
        pixels = BitImageProcessor.from_pretrained(dinov2_folder)(list(x), return_tensors="pt")[
            "pixel_values"
        ]
        expected = model(pixels).last_hidden_state[:, 0]
    extractor = build_extractor(f"dinov2:{dinov2_folder}")
    assert extractor.num_features == 16
    assert torch.allclose(extract_features([x], extractor, resize="none"), expected, atol=1e-5)


def test_clip_score_is_the_cosine_and_long_prompts_are_truncated(clip_folder):
    """A negative cosine is reported as 0, which would hide a wrong value, so the projection is negated for those."""
    extractor = build_extractor(f"clip:{clip_folder}")
    prompts = ["a red letter a on white", "a blue letter b on gray " * 300, "<b>\u202e../../x"]
    x = images(3, size=32)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        features = extract_features([x], extractor, resize="none")
        tokens = processor.tokenizer(
            prompts, padding=True, truncation=True, max_length=12, return_tensors="pt"
        )
        read = model.text_projection(model.text_model(**tokens).pooler_output)
        cosines = torch.nn.functional.cosine_similarity(features, read).tolist()
    for k, cosine in enumerate(cosines):
        pair = ([x[k : k + 1]], prompts[k : k + 1])
        assert clip_score(extractor, *pair) == pytest.approx(max(100 * cosine, 0), abs=1e-3)
        extractor.net.visual_projection.weight.neg_()
        assert clip_score(extractor, *pair) == pytest.approx(max(-100 * cosine, 0), abs=1e-3)
        extractor.net.visual_projection.weight.neg_()
    for sign in (1, -1):
        expected = max(sign * 100 * sum(cosines) / 3, 0)
        assert clip_score(extractor, x.split(2), prompts) == pytest.approx(expected, abs=1e-3)
        extractor.net.visual_projection.weight.neg_()
    with pytest.raises(ValueError, match="needs CLIP"):
        clip_score(build_extractor("reader"), [x], prompts)


def test_the_inception_file_is_checked_and_gets_inputs_in_its_range(scripted, monkeypatch):
    with pytest.raises(ValueError, match=r"sha256 .* expected f58cb9b6ec323ed6"):
        build_extractor(f"inception:{scripted}")
    spec = f"inception:{scripted}#sha256={sha256_file(scripted)}"
    extractor = build_extractor(spec)
    features = extract_features([images()], extractor, resize="torchmetrics")
    assert features.shape == (5, 2048)
    from stepdistill.evaluation.measure.resize import resize

    sized = resize(images(), "torchmetrics", size=299)
    assert torch.allclose(features, Scripted()(sized).detach(), atol=1e-5)
    with pytest.raises(ValueError, match="inception takes 299 x 299 images, got 40 x 40"):
        extract_features([images()], extractor, resize="none")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(scripted))
    with pytest.raises(ValueError, match="expected f58cb9b6"):
        build_extractor("inception")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_weights_in_half_precision_still_give_float32_features(kind, clip_folder, dinov2_folder, tmp_path):
    folder = {"clip": clip_folder, "dinov2": dinov2_folder}[kind]
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    weights = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    extractor = build_extractor(f"{kind}:{half}")
    assert {parameter.dtype for parameter in extractor.parameters()} == {torch.float32}
    x = images(2, size=extractor.input_size)
    features = extract_features([x], extractor, resize="none")
    assert torch.allclose(
        features,
        extract_features([x], build_extractor(f"{kind}:{folder}"), resize="none"),
        atol=0.01,
        rtol=0.01,
    )


def test_a_folder_with_missing_weights_is_refused_instead_of_left_random(clip_folder, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    text = {name: tensor for name, tensor in weights.items() if not name.startswith("vi")}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"evaluation\.features: cannot load .*no weights for vision_model"):
        build_extractor(f"clip:{folder}")
    with pytest.raises(ValueError, match=r"evaluation\.features: cannot load .*it holds clip"):
        build_extractor(f"dinov2:{clip_folder}")
    (folder / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"evaluation\.features: cannot load"):
        build_extractor(f"clip:{folder}")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_the_key_that_names_a_folder_is_blamed_for_it(kind):
    for options, key in (
        ({"features": f"{kind}:/nope"}, "features"),
        ({"features": "reader", kind: "/nope"}, kind),
    ):
        with pytest.raises(ValueError, match=rf"^evaluation\.{key}: cannot load /nope: "):
            Distances(Evaluation(**options))


def test_a_missing_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"no Inception weights at .*STEPDISTILL_INCEPTION"):
        build_extractor("inception")
    for spec in ("clip", "vgg", "", "reader:x"):
        with pytest.raises(ValueError, match="allowed: reader, inception"):
            build_extractor(spec)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({}))
    for spec in (f"clip:{tmp_path / 'empty'}", f"dinov2:{tmp_path / 'nowhere'}"):
        with pytest.raises(ValueError, match=r"cannot load .*model\.safetensors") as caught:
            build_extractor(spec)
        assert "\n" not in str(caught.value)


def test_the_reader_accepts_only_its_own_size():
    extractor = build_extractor("reader")
    assert extract_features([images(size=32)], extractor, resize="none").shape == (5, 96)
    assert extract_features([images(size=64)], extractor, resize="torchmetrics").shape == (5, 96)
    with pytest.raises(ValueError, match="takes 32 x 32 images, got 64 x 64"):
        extract_features([images(size=64)], extractor, resize="none")


def test_a_crop_is_not_resized():
    extractor = build_extractor("reader")
    x = images(size=50)
    inner = x[:, :, 9:41, 9:41]
    assert torch.equal(
        extract_features([x], extractor, resize="none", crop=32),
        extract_features([inner], extractor, resize="none"),
    )
