"""Reader of tokenizers, for every program; files of newer libraries are converted while they are read."""

from __future__ import annotations

import codecs
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import tokenizers  # type: ignore[import-untyped]
import transformers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from llava.errors import CheckpointError, one_line
from llava.model.checkpoint import read_json

CONFIG, FAST_FILE, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
SENTENCEPIECE: Final = ("", "LlamaTokenizer", "LlamaTokenizerFast")
FAST: Final = ("", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "TokenizersBackend")
NEWER_CLASSES: Final = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
NEWER_KEYS: Final = ("backend", "is_local", "local_files_only")


class NewerFormError(ValueError):
    """A setting of a newer library that this one would ignore or misread."""


def load_tokenizer(directory: Path, **kwargs: int | str | bool) -> PreTrainedTokenizerBase:
    """The slow tokenizer if available, as in the published recipes, else the fast one (MPT's GPT-NeoX has no slow one).

    `kwargs` are passed to the tokenizer (`model_max_length`, `padding_side`, …). Raises `CheckpointError` if the
    directory has no tokenizer, a damaged one, one that requires code, or one that only a newer library can read.
    """
    settings = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    named = str(settings.get("tokenizer_class") or "")
    newer = newer_settings(settings)
    has_fast_file = (directory / FAST_FILE).is_file()
    slow = tokenizer_class_from_name(named.removesuffix("Fast")) if named and named not in NEWER_CLASSES else None
    kind: Any = AutoTokenizer
    if (directory / "tokenizer.model").is_file() and named in SENTENCEPIECE:
        kind = LlamaTokenizer
    elif has_fast_file and (named in FAST or (slow is not None and not _is_complete(slow, directory))):
        kind = PreTrainedTokenizerFast
    elif not named:
        raise CheckpointError(f"{directory} has no tokenizer.model or tokenizer.json; download it again.")
    data: dict[str, Any] = {}
    try:
        if has_fast_file and (kind is PreTrainedTokenizerFast or (kind is AutoTokenizer and slow is None)):
            data = read_json(directory / FAST_FILE)
            newer += convert_fast_file(data)
            if newer and kind is AutoTokenizer and tokenizer_class_from_name(f"{named}Fast") is not None:
                kind = PreTrainedTokenizerFast
        if kind is AutoTokenizer:
            kwargs = {"use_fast": slow is None, "trust_remote_code": False, **kwargs}
        with tempfile.TemporaryDirectory() as copy:
            converted = newer or _needs_copy(directory, settings)
            source = _convert(directory, Path(copy), settings, data, kind) if converted else directory
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(source, **kwargs)
        tokenizer.name_or_path = str(directory)
        if isinstance(file := getattr(tokenizer, "vocab_file", None), str):  # saving copies it
            tokenizer.vocab_file = str(directory / Path(file).name)
        return tokenizer
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise _unreadable(directory, named, newer, error) from error


def _unreadable(directory: Path, named: str, newer: list[str], error: Exception) -> CheckpointError:
    """The `CheckpointError` for a tokenizer that raised `error`."""
    reason = one_line(error, 200)
    if newer or isinstance(error, NewerFormError):
        form = f" ({', '.join(newer)})" if newer else ""
        return CheckpointError(
            f"The tokenizer of {directory} is in a newer form{form}, which transformers {transformers.__version__} "
            f"with tokenizers {tokenizers.__version__} cannot read ({reason}); use the tokenizer files of the model it "
            "was made from, or save it with transformers 4.44 or older."
        )
    return CheckpointError(
        f"The tokenizer of {directory} ({named or 'without a class'}) cannot be loaded: {reason}. Code in checkpoints "
        "is not executed; download the tokenizer files again, or save them in the tokenizer.json layout."
    )


def _is_complete(slow: type[PreTrainedTokenizerBase], directory: Path) -> bool:
    """Whether the vocabulary files of a slow tokenizer are there; transformers 5 writes only `tokenizer.json`."""
    return all((directory / name).is_file() for name in slow.vocab_files_names.values() if name != FAST_FILE)


def _needs_copy(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether there is a chat template in its own file, or a byte order mark before the settings."""
    marked = (directory / CONFIG).is_file() and (directory / CONFIG).read_bytes().startswith(codecs.BOM_UTF8)
    return marked or ((directory / TEMPLATE).is_file() and "chat_template" not in settings)


def newer_settings(settings: dict[str, Any]) -> list[str]:
    """The keys of a `tokenizer_config.json` that transformers 5 has introduced or changed."""
    newer = [f"tokenizer_class {name}" for name in (settings.get("tokenizer_class"),) if name in NEWER_CLASSES]
    newer += ["extra_special_tokens"] * isinstance(settings.get("extra_special_tokens"), list)
    return newer + [key for key in NEWER_KEYS if key in settings]


def convert_fast_file(data: dict[str, Any]) -> list[str]:
    """Rewrite the contents of a `tokenizer.json` in place for the pinned library; returns what was newer.

    Raises `NewerFormError` for what it would compute differently.
    """
    newer = []
    model = data.get("model")
    if not isinstance(model, dict):
        return []
    merges = model.get("merges") or []
    if any(isinstance(merge, list) for merge in merges):
        newer.append("merges as pairs")
        if any(" " in piece for merge in merges for piece in merge):
            raise NewerFormError("its merges contain spaces")
        model["merges"] = [" ".join(merge) for merge in merges]
    for name in ("pre_tokenizer", "decoder"):
        parts = [data.get(name)]
        for part in parts:
            if not isinstance(part, dict):
                continue
            parts += [item for value in part.values() if isinstance(value, list) for item in value]
            if part.get("type") == "Metaspace" and "add_prefix_space" not in part:
                newer.append(f"Metaspace {name}")
                if part.pop("split", True) is False and name == "pre_tokenizer":
                    raise NewerFormError("its Metaspace does not split")
                part["add_prefix_space"] = part.get("prepend_scheme") != "never"
    if model.pop("ignore_merges", False):
        newer.append("ignore_merges")
        added = {token.get("content") for token in data.get("added_tokens") or []}
        bpe = tokenizers.Tokenizer.from_str(json.dumps({**data, "post_processor": None, "added_tokens": []})).model
        if any(len(bpe.tokenize(piece)) > 1 for piece in model.get("vocab", {}) if piece not in added):
            raise NewerFormError("ignore_merges: its merges do not make every entry of the vocabulary")
    return newer


def _convert(directory: Path, copy: Path, settings: dict[str, Any], data: dict[str, Any], kind: type) -> Path:
    """Write the tokenizer files of `directory` to `copy`, in the form of the pinned library."""
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, copy / name)
    settings = {key: value for key, value in settings.items() if key not in NEWER_KEYS}
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings.setdefault("additional_special_tokens", extra)
    if kind is PreTrainedTokenizerFast:
        settings["tokenizer_class"] = kind.__name__
    if (directory / TEMPLATE).is_file() and "chat_template" not in settings:
        settings["chat_template"] = (directory / TEMPLATE).read_text(encoding="utf-8-sig")
    (copy / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    if data:
        (copy / FAST_FILE).write_text(json.dumps(data), encoding="utf-8")
    elif (directory / FAST_FILE).is_file() and kind is AutoTokenizer:
        shutil.copyfile(directory / FAST_FILE, copy / FAST_FILE)
    return copy
