"""Cache files for the features of a set of images, with a key of everything they depend on and the sha256 of their bytes."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from stepdistill.disk.durable import canonical, warn_of_damage, write_bytes


def read_features(path: Path, key: str) -> torch.Tensor | None:
    """Features (N, D), float32, that `write_features` wrote under `key`.

    None if the file is missing, has another key, or is damaged; a damaged file is logged as a warning.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, features = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError, KeyError, ValueError):
        warn_of_damage(path, "the features are computed again")
        return None
    if about.get("sha256") != _digest(features, about.get("key", "")):
        if "sha256" in about:  # files of an earlier version have none
            warn_of_damage(path, "the features are computed again")
        return None
    return features if about["key"] == key else None


def write_features(path: Path, features: torch.Tensor, key: str) -> None:
    """Writes features (N, D), float32, atomically; equal features give equal bytes. ValueError if writing fails."""
    about = {"key": key, "sha256": _digest(features, key)}
    write_bytes(path, canonical(save({"features": features.contiguous()}, metadata=about)))


def _digest(features: torch.Tensor, key: str) -> str:
    """sha256 over key, shape and bytes."""
    digest = hashlib.sha256(f"{key} {tuple(features.shape)}".encode())
    digest.update(features.contiguous().numpy().tobytes())
    return digest.hexdigest()
