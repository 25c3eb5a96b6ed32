"""Load the tokenizer of a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from llava.errors import CheckpointError
from llava.model.checkpoint import read_json


def load_tokenizer(directory: Path, **kwargs: int | str | bool) -> PreTrainedTokenizerBase:
    """The slow tokenizer if available, as in the published recipes, else the fast one (MPT's GPT-NeoX has no slow one).

    `kwargs` are passed to the tokenizer (`model_max_length`, `padding_side`, …). Raises `CheckpointError` if the
    directory has no tokenizer, a damaged one, or one that requires code.
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
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise CheckpointError(
            f"The tokenizer of {directory} ({named or 'without a class'}) cannot be loaded: "
            f"{' '.join(str(error).split())[:200]}. Code in checkpoints is not executed; download the tokenizer files "
            "again, or save them in the tokenizer.json layout."
        ) from error
    raise CheckpointError(f"{directory} has no tokenizer.model or tokenizer.json; download it again.")
