"""Hashes of a teacher's parts: weights by the bytes of their files, configs by their values. No torch.

A file is read once in a process, unless its size or its times change.
"""

import functools
import hashlib
from pathlib import Path

from stepdistill.disk.durable import sha256_bytes, sha256_file, sha256_json
from stepdistill.teacher.facts import TeacherFacts
from stepdistill.teacher.files import read_object
from stepdistill.teacher.folder import CONFIG_FILES, WEIGHTS, pipeline_parts

_DIGITS = 16
# Keys that say who saved a config, not what the model is.
_VOLATILE = ("_diffusers_version", "_name_or_path", "_commit_hash", "transformers_version")
_OF_TOKENIZERS = (
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "tokenizer_config.json", "spiece.model", "chat_template.jinja"),
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of a pipeline's text encoders; most pipelines have fewer."""


def weights_fingerprint(folder: Path, *parts: str) -> str:
    """sha256 over the weight files of these parts of a pipeline's folder, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in (path for part in parts for path in sorted((folder / part).glob("*.safetensors"))):
        digest.update(bytes.fromhex(_digest(path)))
    return digest.hexdigest()[:_DIGITS]


def network_fingerprint(folder: Path) -> str:
    """The hash of the weights of a pipeline's U-Net or transformer, which identifies the base that a LoRA belongs to."""
    return weights_fingerprint(folder, TeacherFacts.of_folder(folder).network_part)


def part_fingerprints(folder: Path) -> dict[str, str]:
    """The hash of every part of a pipeline on which its images depend, by the name that a message gives the part.

    A folder that is copied or renamed keeps them. ValueError if a config cannot be read.
    """
    index = read_object(folder / "model_index.json")
    kind = {name: index.get(name) for name in ("_class_name", "force_zeros_for_empty_prompt")}
    hashes = {"the pipeline (model_index.json)": sha256_json(kind)}
    for name in pipeline_parts(index):
        file = CONFIG_FILES.get(name, "config.json")
        if name.startswith("tokenizer"):
            hashes[f"the tokenizer ({name}/)"] = _tokenizer(folder / name)
            continue
        config = {k: v for k, v in read_object(folder / name / file).items() if k not in _VOLATILE}
        hashes[f"the config {name}/{file}"] = sha256_json(config)
        if name in WEIGHTS:
            hashes[f"the weights in {name}/"] = weights_fingerprint(folder, name)
    return hashes


def _tokenizer(folder: Path) -> str:
    files = [folder / name for name in _OF_TOKENIZERS]
    return sha256_json({file.name: sha256_bytes(file.read_bytes()) for file in files if file.is_file()})


def _digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    about = path.stat()
    return _digest_of(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, *_version: int) -> str:
    return sha256_file(path)
