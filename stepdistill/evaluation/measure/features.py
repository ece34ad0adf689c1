"""Feature extractors: the reader, Inception, CLIP, DINOv2, and a small net trained on the run's training images.

All weights are local files. Nothing is downloaded; the error for a missing file names it.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics.multimodal.clip_score import CLIPScore

from stepdistill.demo.world import SHIPPED_READERS, load_reader, reader_file
from stepdistill.disk.durable import sha256_file
from stepdistill.evaluation.measure.distances import ALONE
from stepdistill.evaluation.measure.feature_files import (
    LOCAL,
    check_files,
    check_hash,
    check_numbers,
    inception_file,
    read_processor,
    read_script,
    where_to_get_it,
)
from stepdistill.evaluation.measure.resize import center_crop, resize
from stepdistill.evaluation.measure.small_net import NUM_FEATURES, read_small_net
from stepdistill.messages import first_line

_NORMAL = ("mean", "std")
_READERS_KID_GAMMA = {"reader": 1e-4, "pairs_reader": 4e-5}
_ALLOWED = (
    "reader, pairs_reader, inception, inception:FILE, inception:FILE#sha256=HEX, clip:FOLDER, dinov2:FOLDER, trained, "
    "trained:FOLDER"
)


class FeatureExtractor(nn.Module):
    """Base class: images (B, 3, H, W), float in 0..255 -> features (B, num_features).

    sha256          hash of the extractor's files
    input_size      side in pixels of the images that it takes; None for any
    kid_gamma       gamma of KID's kernel; None: 1 / num_features, as published. Set for features whose squared length is far
                    from num_features
    default_resize  resize protocol if evaluation.resize is not set
    """

    kid_gamma: float | None = None
    default_resize: str = "pil_bicubic"

    def __init__(self, name: str, num_features: int, sha256: str, input_size: int | None) -> None:
        super().__init__()
        self.name, self.num_features = name, num_features
        self.sha256, self.input_size = sha256, input_size


class ReaderFeatures(FeatureExtractor):
    """A reader of a world's images: 96 features of images of the world's size.

    name    "reader": letters, 32 x 32, features of mean squared length 7,600; "pairs_reader": pairs, 48 x 48, 18,300
    path    weights of another reader of the same world; by default those that ship with the package
    """

    default_resize = "none"

    def __init__(self, path: Path | None = None, *, name: str = "reader") -> None:
        path, questions = path or reader_file(name), SHIPPED_READERS[name]
        reader = load_reader(path, questions)
        super().__init__(name, reader.num_features, sha256_file(path), questions.image_size)
        self.kid_gamma = _READERS_KID_GAMMA[name]
        self.reader = reader

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, 96); ValueError for another size than the world's."""
        _require_size(images, self)
        return self.reader.features(images.round().to(torch.uint8))


class InceptionFeatures(FeatureExtractor):
    """The 2048 pool features of FID's Inception, from a TorchScript file or through torch-fidelity."""

    default_resize = "torchmetrics"

    def __init__(self, path: Path, *, sha256: str | None = None) -> None:
        if not path.is_file():
            raise ValueError(f"evaluation.features: no Inception weights at {path}; {where_to_get_it()}")
        digest = sha256_file(path)
        check_hash(path, digest, sha256)
        super().__init__("inception", 2048, digest, 299)
        self._scripted = path.suffix == ".pt"
        if self._scripted:
            self.net: Any = read_script(path)
        elif importlib.util.find_spec("torch_fidelity") is not None:
            from torchmetrics.image.fid import NoTrainInceptionV3

            try:
                self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
            except Exception as error:  # torch and torch-fidelity raise many types of errors for other files
                raise ValueError(
                    f"evaluation.features: cannot read {path}: {first_line(error)}; {where_to_get_it()}"
                ) from None
        else:
            raise ValueError(
                f"evaluation.features: {path.name} needs torch-fidelity (the `inception` extra); {where_to_get_it()}"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 299, 299) -> (B, 2048); ValueError for another size. Images are rounded for torch-fidelity's network, which
        takes uint8."""
        _require_size(images, self)
        if self._scripted:
            return self.net.layers((images - 128) / 128).flatten(1)
        return self.net(images.round().clamp(0, 255).to(torch.uint8)).flatten(1)


class TransformersFeatures(FeatureExtractor):
    """CLIP's image embedding or DINOv2's class token, from a local folder with safetensors weights."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, kind: str, folder: Path, *, key: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, CLIPModel, Dinov2Model

        loader = {"clip": CLIPModel, "dinov2": Dinov2Model}[kind]
        try:
            check_files(folder)
            if (model_type := AutoConfig.from_pretrained(folder, **LOCAL).model_type) != kind:
                raise ValueError(f"it holds {model_type}")
            options = LOCAL | {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            net, loaded = loader.from_pretrained(folder, **options)
            if loaded["missing_keys"]:  # transformers would initialise them randomly
                raise ValueError(f"no weights for {min(loaded['missing_keys'])}")
            processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
            size = net.config.vision_config.image_size if kind == "clip" else _crop_size(processor)
            normal = {n: torch.tensor(getattr(processor, f"image_{n}")).view(1, 3, 1, 1) for n in _NORMAL}
            check_numbers(size, normal["std"])
            if kind == "clip":
                read_processor(folder)(text=["a photo"], return_tensors="pt", padding=True)
        except Exception as error:  # transformers raises many types of errors for broken files
            raise ValueError(
                f"{key}: cannot load {folder}: {first_line(error)}; "
                f"allowed: a folder with config.json, preprocessor_config.json and model.safetensors"
                + (", and CLIP's tokenizer" if kind == "clip" else "")
            ) from None
        digest = hashlib.sha256()
        for file in (*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*config.json"))):
            digest.update(bytes.fromhex(sha256_file(file)))
        width = net.config.projection_dim if kind == "clip" else net.config.hidden_size
        super().__init__(kind, width, digest.hexdigest(), size)
        self.folder = folder
        self.net: Any = net.eval().requires_grad_(False)
        for name in _NORMAL:
            self.register_buffer(name, normal[name] * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, input_size, input_size) -> (B, num_features); ValueError for another size."""
        _require_size(images, self)
        pixels = (images - self.mean) / self.std
        if self.name == "clip":
            return self.net.visual_projection(self.net.vision_model(pixel_values=pixels).pooler_output)
        return self.net(pixel_values=pixels).pooler_output


class TrainedFeatures(FeatureExtractor):
    """The small net (small_net.py) that was trained on a run's images, read from the folder that trained.py writes."""

    def __init__(self, folder: Path) -> None:
        net, sha256 = read_small_net(folder)
        super().__init__("trained", NUM_FEATURES, sha256, net.side)
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) -> (B, 128); ValueError for another size."""
        _require_size(images, self)
        return self.net(images / 127.5 - 1)


def build_extractor(
    spec: str, *, device: torch.device | str = "cpu", key: str = "evaluation.features"
) -> FeatureExtractor:
    """The extractor that `spec` names, in eval mode; ValueError if the name is unknown or a file is missing.

    key: the config's key that names CLIP's or DINOv2's folder, for the message.
    """
    kind, _, rest = spec.partition(":")
    if spec in SHIPPED_READERS:
        made: FeatureExtractor = ReaderFeatures(name=spec)
    elif kind == "inception":
        file, _, digest = rest.partition("#sha256=")
        made = InceptionFeatures(Path(file) if file else inception_file(), sha256=digest or None)
    elif kind in ("clip", "dinov2") and rest:
        made = TransformersFeatures(kind, Path(rest), key=key)
    elif kind == "trained" and rest:
        made = TrainedFeatures(Path(rest))
    else:
        raise ValueError(f"evaluation.features: got {spec!r}; allowed: {_ALLOWED}")
    return made.eval().requires_grad_(False).to(device)


@torch.no_grad()
def extract_features(
    batches: Iterable[torch.Tensor],
    extractor: FeatureExtractor,
    *,
    resize: str,
    crop: int | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """Features (N, D), float32 on the CPU, of uint8 batches (B, 3, H, W), which are cropped and resized first.

    batch_size: most images per forward pass of the extractor.
    """
    features = [
        _features(part, extractor, protocol=resize, crop=crop)
        for batch in batches
        for part in batch.split(batch_size)
    ]
    return torch.cat(features)


@torch.no_grad()
def clip_score(extractor: FeatureExtractor, batches: Iterable[torch.Tensor], prompts: Sequence[str]) -> float:
    """100 max(mean cos(image, prompt), 0) by torchmetrics (Hessel et al. 2021, Eq 1); long prompts are truncated.

    ValueError if the extractor is not CLIP.
    """
    if not isinstance(extractor, TransformersFeatures) or extractor.name != "clip":
        raise ValueError(f"CLIP score needs CLIP, got {extractor.name}")
    processor, net = read_processor(extractor.folder), extractor.net
    context = net.config.text_config.max_position_embeddings

    def read(*, text: list[str] | None = None, **options: Any) -> Any:
        """The processor, with prompts truncated so that their end token stays; torchmetrics would cut that token off."""
        if text is None:
            return processor(**options)
        return processor.tokenizer(text, truncation=True, max_length=context, **options)

    metric = CLIPScore(model_name_or_path=lambda: (_Unwrapped(net), read), **ALONE)
    metric.to(extractor.mean.device)
    first = 0
    for batch in batches:
        metric.update(list(batch.to(extractor.mean.device)), list(prompts[first : first + len(batch)]))
        first += len(batch)
    return float(metric.compute())


@torch.no_grad()
def _text_embeddings(
    extractor: FeatureExtractor, prompts: Sequence[str], *, batch_size: int = 64
) -> torch.Tensor:
    """CLIP's embeddings (N, D) of prompts, of norm 1, on the CPU; long ones are truncated. ValueError if it is not CLIP."""
    if not isinstance(extractor, TransformersFeatures) or extractor.name != "clip":
        raise ValueError(f"text embeddings need CLIP, got {extractor.name}")
    tokenizer, net = read_processor(extractor.folder).tokenizer, _Unwrapped(extractor.net)
    options = {"truncation": True, "max_length": net.config.text_config.max_position_embeddings}
    device, rows = extractor.mean.device, []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        tokens = tokenizer(part, padding=True, return_tensors="pt", **options).to(device)
        rows.append(net.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu())
    return nn.functional.normalize(torch.cat(rows), dim=1)


def nearest_prompts(extractor: FeatureExtractor, images: torch.Tensor, prompts: Sequence[str]) -> list[str]:
    """The prompt whose CLIP embedding has the largest cosine to each image's (N, D). ValueError if it is not CLIP."""
    distinct = sorted(set(prompts))
    texts = _text_embeddings(extractor, distinct)
    nearest = [int(k) for part in images.split(1024) for k in (part @ texts.T).argmax(dim=1)]
    return [distinct[k] for k in nearest]


def pick_score(extractor: FeatureExtractor, images: torch.Tensor, prompts: Sequence[str]) -> float:
    """PickScore (Kirstain et al. 2023, 2305.01569) of images by their embeddings (N, D): the model's scale times the cosine
    between an image and its prompt, averaged. ValueError if the extractor is not CLIP."""
    texts = _text_embeddings(extractor, prompts)
    cosines = (nn.functional.normalize(images, dim=1) * texts).sum(dim=1)
    net: Any = extractor.net
    return float(net.logit_scale.exp().cpu() * cosines.mean())


class _Unwrapped(nn.Module):
    """CLIP whose get_*_features return tensors; those of transformers 5 return objects, which torchmetrics cannot use."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net
        self.config = net.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.net.visual_projection(self.net.vision_model(pixel_values=pixel_values).pooler_output)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        text = self.net.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.net.text_projection(text.pooler_output)


def _features(
    images: torch.Tensor, extractor: FeatureExtractor, *, protocol: str, crop: int | None
) -> torch.Tensor:
    if crop is not None:
        images = center_crop(images, crop)
    device = next(extractor.parameters()).device
    sized = resize(images.to(device), protocol, size=extractor.input_size or images.shape[-1])
    return extractor(sized).float().cpu()


def _require_size(images: torch.Tensor, extractor: FeatureExtractor) -> None:
    side, got = extractor.input_size, tuple(images.shape[-2:])
    if got != (side, side):
        raise ValueError(
            f"evaluation.resize: {extractor.name} takes {side} x {side} images, got {got[0]} x {got[1]}; "
            f"allowed here: torchmetrics, tf1, pil_bicubic, lanczos512"
        )


def _crop_size(processor: object) -> int:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    return int(size.get("height") or size.get("shortest_edge") or 224)
