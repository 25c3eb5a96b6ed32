"""The tokenizer of a checkpoint directory, found by its files (any LLaMA-architecture model brings its own)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llava.errors import CheckpointError
from llava.model.checkpoint import read_json


def load_tokenizer(directory: Path, **kwargs: Any) -> Any:
    """The slow tokenizer where there is one (as the published recipes use), otherwise the fast one.

    `kwargs` go to the tokenizer (`model_max_length`, `padding_side`, …). Raises `CheckpointError` when the directory
    holds neither `tokenizer.model` nor `tokenizer.json`.
    """
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    named = str(settings.get("tokenizer_class", ""))
    if (directory / "tokenizer.model").is_file() and named in ("", "LlamaTokenizer", "LlamaTokenizerFast"):
        return LlamaTokenizer.from_pretrained(directory, **kwargs)
    if (directory / "tokenizer.json").is_file() and named in ("", "PreTrainedTokenizerFast", "LlamaTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(directory, **kwargs)
    if named:
        return AutoTokenizer.from_pretrained(directory, use_fast=False, trust_remote_code=False, **kwargs)
    raise CheckpointError(f"{directory} holds no tokenizer (tokenizer.model or tokenizer.json); download it again.")
