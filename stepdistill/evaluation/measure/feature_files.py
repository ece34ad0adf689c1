"""The files of extractors that are not shipped: where they are, whether they are whole, and what they may ask for."""

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
"""Of every from_pretrained here."""
_LARGEST_SIDE = 2048


def check_files(folder: Path) -> None:
    """ValueError where files of CLIP or DINOv2 are broken, or its config asks for more than its weights hold."""
    config = read_object(folder / "config.json")
    files = weight_files(folder, "model", None)
    check_counts(folder / "config.json", config, read_headers(files))
    key = not_finite(files)
    if key is not None:
        raise ValueError(f"{key} of {files[0]} holds numbers that are not finite")


def check_numbers(size: int, std: torch.Tensor) -> None:
    """ValueError for pictures of an absurd size, and for a deviation that pixels cannot be divided by."""
    if not 1 <= int(size) <= _LARGEST_SIDE:
        raise ValueError(f"it wants pictures of {size} pixels; allowed: up to {_LARGEST_SIDE}")
    if not bool((std > 0).all()):
        raise ValueError(f"preprocessor_config.json has image_std {std.flatten().tolist()}; allowed: above 0")


def read_processor(folder: Path) -> Any:
    """What turns pictures and prompts into CLIP's input; ValueError where there is no vocabulary."""
    from transformers import AutoProcessor

    if not has_vocabulary(folder):
        raise ValueError("it has no tokenizer.json, and no vocab.json with merges.txt")

    return AutoProcessor.from_pretrained(folder, **LOCAL)


def read_script(path: Path) -> Any:
    """NVIDIA's TorchScript of Inception; ValueError for another file."""
    try:
        net = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:  # torch raises what another file leads it to
        raise ValueError(
            f"evaluation.features: {path} is no TorchScript: {first_line(error)}; {where_to_get_it()}"
        ) from None
    if not hasattr(net, "layers"):
        raise ValueError(
            f"evaluation.features: {path} is another TorchScript than FID's; {where_to_get_it()}"
        )
    return net


def check_hash(path: Path, sha256: str, given: str | None) -> None:
    """ValueError where a file's sha256 is another than its makers', or than the one that the config gives."""
    expected = given or (TORCHSCRIPT_SHA256 if path.suffix == ".pt" else _STATE_DICT_SHA256)
    if len(expected) < 8 or not sha256.startswith(expected.lower()):
        raise ValueError(
            f"evaluation.features: {path} has sha256 {sha256[:16]}.., expected {expected[:16]}..: another or a broken file; "
            f"inception:FILE#sha256=HEX takes it on your word"
        )


def inception_file() -> Path:
    """Where Inception is looked for without a name: the variable's file, else torch-fidelity's own download."""
    given = os.environ.get(INCEPTION_VARIABLE)
    if given:
        return Path(given)
    return Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def where_to_get_it() -> str:
    """For messages."""
    return (
        f"allowed: NVIDIA's inception-2015-12-05.pt (needs no package) or torch-fidelity's "
        f"weights-inception-2015-12-05-6726825d.pth, as inception:FILE or in {INCEPTION_VARIABLE}; "
        f"or clip:FOLDER, dinov2:FOLDER, or trained, which learns from pictures of your own in minutes"
    )
