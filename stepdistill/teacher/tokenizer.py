"""Checks a tokenizer by using it. transformers loads one without a vocabulary too, and then encodes all texts alike."""

import itertools
import json
import string
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedConfig

from stepdistill.messages import first_line, short
from stepdistill.teacher.layouts import Layout

_MAX_TOKENS = 4096
_TEXTS = ("a photo of a cat", "a drawing of two dogs", *string.ascii_lowercase)
"""Texts that no tokenizer may encode alike."""
_LOST_MERGES = 0.01
"""The list of merges counts as incomplete if more than this share of the vocabulary has no merge that makes it. Some intact
tokenizers have a few such words: those that were added later."""


def use_tokenizer(folder: Path, kind: str, encoder: PreTrainedConfig, layout: Layout) -> None:
    """ValueError if a tokenizer cannot be loaded, encodes two texts alike, or gives tokens that its encoder cannot take.

    Args:
        folder: the tokenizer's folder.
        kind: its class in model_index.json.
        encoder: the config of the text encoder that takes its tokens.
        layout: of the pipeline, which may take fewer tokens than the tokenizer has.
    """
    tokenizer_class = class_of(transformers, kind, transformers.PreTrainedTokenizerBase)
    if tokenizer_class is None:
        raise ValueError(f"model_index.json says {short(kind)}; allowed: a tokenizer of transformers")
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        length, largest_id = int(tokenizer.model_max_length), max(tokenizer.get_vocab().values())
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for broken files
        raise ValueError(f"cannot load {folder}: {first_line(error)}") from None
    if layout.text is not None and folder.name == layout.text[0]:
        length = min(length, layout.text[1])
    most = getattr(encoder, "max_position_embeddings", _MAX_TOKENS)  # T5 has no limit
    if not 2 <= length <= min(most, _MAX_TOKENS):
        raise ValueError(
            f"{folder} has model_max_length {short(length)}; allowed: 2 to {most}, the limit of its text encoder"
        )
    if largest_id >= encoder.vocab_size:
        raise ValueError(
            f"{folder} has a token with id {largest_id}; its text encoder has {encoder.vocab_size} rows of embeddings"
        )
    if layout.is_chat and not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template, in which the pipeline encodes prompts; fix: copy chat_template.jinja too, or "
            f"tokenizer_config.json with its chat_template"
        )
    _encode(folder, tokenizer, length)
    _check_merges(folder, tokenizer)


def _encode(folder: Path, tokenizer: Any, length: int) -> None:
    """ValueError if the tokenizer does not fill `length` tokens, knows no word, or encodes two of _TEXTS alike."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    try:
        encoded = {text: tuple(tokenizer(text, **options).input_ids) for text in _TEXTS}
        special = set(tokenizer.all_special_ids)
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for broken files
        raise ValueError(f"{folder} cannot encode a text: {first_line(error)}") from None
    tokens = encoded[_TEXTS[0]]
    if len(tokens) != length:
        raise ValueError(
            f"{folder} encodes a text as {len(tokens)} tokens instead of its model_max_length {length}"
        )
    if not set(tokens) - special:
        raise ValueError(f"{folder} knows no word of a simple text: its vocabulary is incomplete")
    alike = next(
        (pair for pair in itertools.combinations(_TEXTS, 2) if encoded[pair[0]] == encoded[pair[1]]), None
    )
    if alike is not None:
        raise ValueError(
            f"{folder} encodes {alike[0]!r} and {alike[1]!r} as the same tokens: its vocabulary is incomplete"
        )


def _check_merges(folder: Path, tokenizer: Any) -> None:
    """ValueError if most of a vocabulary's words are never made, as its list of merges is empty or cut short."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        return
    end = str(model.get("end_of_word_suffix") or "")
    special = set(tokenizer.all_special_tokens)
    words = {word for word in model["vocab"] if len(word.removesuffix(end)) > 1 and word not in special}
    made = {
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]
    }
    lost = sorted(words - made)
    if len(lost) > _LOST_MERGES * len(model["vocab"]):
        raise ValueError(
            f"{folder} has merges for {len(words) - len(lost)} of its {len(words)} words: its list of merges is incomplete"
        )


def class_of(library: ModuleType, name: str, base: type) -> Any:
    """The class of that name in a library; None if there is no such class or it is not a subclass of `base`."""
    member = getattr(library, name, None)
    return member if isinstance(member, type) and issubclass(member, base) else None
