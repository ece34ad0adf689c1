"""Files of extractors that are not shipped: where they are expected, and checks that they are complete and safe to load."""

import os
from pathlib import Path
from typing import Any

import torch

from stepdistill.messages import first_line
from stepdistill.teacher.examine import not_finite
from stepdistill.teacher.files import check_counts, read_headers, read_object, weight_files
from stepdistill.teacher.folder import has_vocabulary

INCEPTION_VARIABLE = "STEPDISTILL_INCEPTION"
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every from_pretrained call for extractors: local files, no remote code."""
_LARGEST_SIDE = 2048


def check_files(folder: Path) -> None:
    """ValueError if the files of CLIP or DINOv2 are broken, or the config implies a larger network than the weights hold."""
    config = read_object(folder / "config.json")
    files = weight_files(folder, "model", None)
    check_counts(folder / "config.json", config, read_headers(files))
    key = not_finite(files)
    if key is not None:
        raise ValueError(f"{key} of {files[0]} holds numbers that are not finite")


def check_numbers(size: int, std: torch.Tensor) -> None:
    """ValueError if the image size is absurd, or image_std has values that are not above 0."""
    if not 1 <= int(size) <= _LARGEST_SIDE:
        raise ValueError(f"it takes images of {size} pixels; allowed: 1 to {_LARGEST_SIDE}")
    if not bool((std > 0).all()):
        raise ValueError(f"preprocessor_config.json has image_std {std.flatten().tolist()}; allowed: above 0")


def read_processor(folder: Path) -> Any:
    """The processor that turns images and prompts into CLIP's inputs; ValueError if the folder has no vocabulary."""
    from transformers import AutoProcessor

    if not has_vocabulary(folder):
        raise ValueError("it has no tokenizer.json, and no vocab.json with merges.txt")

    return AutoProcessor.from_pretrained(folder, **LOCAL)


def read_script(path: Path) -> Any:
    """NVIDIA's TorchScript of Inception; ValueError if the file is something else."""
    try:
        net = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:  # torch raises many types of errors for other files
        raise ValueError(
            f"evaluation.features: {path} is no TorchScript: {first_line(error)}; {where_to_get_it()}"
        ) from None
    if not hasattr(net, "layers"):
        raise ValueError(
            f"evaluation.features: {path} is a TorchScript, but not FID's Inception; {where_to_get_it()}"
        )
    return net


def check_hash(path: Path, sha256: str, given: str | None) -> None:
    """ValueError if a file's sha256 is neither `given` (from the config) nor, without that, the published file's."""
    expected = given or (TORCHSCRIPT_SHA256 if path.suffix == ".pt" else _STATE_DICT_SHA256)
    if len(expected) < 8 or not sha256.startswith(expected.lower()):
        raise ValueError(
            f"evaluation.features: {path} has sha256 {sha256[:16]}.., expected {expected[:16]}..: another or a broken file; "
            f"inception:FILE#sha256=HEX accepts the file whose hash you give"
        )


def inception_file() -> Path:
    """Default path of Inception's weights: the environment's STEPDISTILL_INCEPTION, else torch-fidelity's download."""
    given = os.environ.get(INCEPTION_VARIABLE)
    if given:
        return Path(given)
    return Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def where_to_get_it() -> str:
    """The part of a message that says which weights are allowed and how to name them."""
    return (
        f"allowed: NVIDIA's inception-2015-12-05.pt (needs no package) or torch-fidelity's "
        f"weights-inception-2015-12-05-6726825d.pth, as inception:FILE or in {INCEPTION_VARIABLE}; "
        f"or clip:FOLDER, dinov2:FOLDER, or trained, a small net trained on your own images in minutes"
    )
