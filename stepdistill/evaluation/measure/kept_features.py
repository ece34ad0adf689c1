"""Features of a set of images in a file, with the key of all that they depend on and the sha256 of their bytes."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from stepdistill.disk.durable import canonical, warn_of_damage, write_bytes


def read_features(path: Path, key: str) -> torch.Tensor | None:
    """(N, D) float32 that `write_features` wrote under this key; None where there are none, they are of another key, or the
    file is damaged, which is warned of."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, features = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError, KeyError, ValueError):
        warn_of_damage(path, "the features are computed again")
        return None
    if about.get("sha256") != _digest(features, about.get("key", "")):
        if "sha256" in about:  # an earlier version wrote none
            warn_of_damage(path, "the features are computed again")
        return None
    return features if about["key"] == key else None


def write_features(path: Path, features: torch.Tensor, key: str) -> None:
    """Writes (N, D) float32 features in one step, equal ones as equal bytes; ValueError where that cannot be done."""
    about = {"key": key, "sha256": _digest(features, key)}
    write_bytes(path, canonical(save({"features": features.contiguous()}, metadata=about)))


def _digest(features: torch.Tensor, key: str) -> str:
    """sha256 over key, shape and bytes."""
    digest = hashlib.sha256(f"{key} {tuple(features.shape)}".encode())
    digest.update(features.contiguous().numpy().tobytes())
    return digest.hexdigest()
