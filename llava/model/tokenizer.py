"""The tokenizer of a checkpoint directory, found by its files (any LLaMA-architecture model brings its own)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from llava.errors import CheckpointError
from llava.model.checkpoint import read_json


def load_tokenizer(directory: Path, **kwargs: Any) -> Any:
    """The slow tokenizer where there is one (as the published recipes use), otherwise the fast one.

    MPT's GPT-NeoX has no slow one. `kwargs` go to the tokenizer (`model_max_length`, `padding_side`, …). Raises
    `CheckpointError` when the directory holds neither `tokenizer.model` nor `tokenizer.json`, or one that needs code.
    """
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    named = str(settings.get("tokenizer_class", ""))
    try:
        if (directory / "tokenizer.model").is_file() and named in ("", "LlamaTokenizer", "LlamaTokenizerFast"):
            return LlamaTokenizer.from_pretrained(directory, **kwargs)
        if (directory / "tokenizer.json").is_file() and named in ("", "PreTrainedTokenizerFast", "LlamaTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(directory, **kwargs)
        if named:
            has_slow = tokenizer_class_from_name(named.removesuffix("Fast")) is not None
            return AutoTokenizer.from_pretrained(directory, use_fast=not has_slow, trust_remote_code=False, **kwargs)
    except Exception as error:  # the tokenizers package raises nothing narrower for a damaged file
        raise CheckpointError(
            f"The tokenizer of {directory} ({named or 'without a class'}) cannot be loaded: "
            f"{' '.join(str(error).split())[:200]}; code from checkpoints is not run: copy its files again, or save it "
            "in the tokenizer.json layout."
        ) from error
    raise CheckpointError(f"{directory} holds no tokenizer (tokenizer.model or tokenizer.json); download it again.")
