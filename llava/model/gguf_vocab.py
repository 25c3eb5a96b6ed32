"""Write a tokenizer to the metadata of a GGUF file: SentencePiece BPE, or byte-level BPE of a known pre-tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import import_protobuf

from llava.errors import ConfigError
from llava.mm_utils import bos_prefix
from llava.utils import require

if TYPE_CHECKING:
    from gguf import GGUFWriter

SENTENCEPIECE_BPE: Final = 2  # `model_type` of its trainer
BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS: Final = {"type": "Digits", "individual_digits": True}
# llama.cpp identifies pre-tokenizers by name; these are the ones whose ids were compared with those of tokenizers.
PRE_TOKENIZERS: Final = {"gpt-2": [BYTE_LEVEL], "smollm": [DIGITS, BYTE_LEVEL]}
ENDS: Final = ("eos", "eot", "eom")  # keys of tokens that end an answer
ADDED_SCORE: Final = -1000.0  # so low that no merge produces an added token
Entry = tuple[str, float, int]  # text, score, type


def refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> ConfigError:
    return ConfigError(
        f"The tokenizer of {tokenizer.name_or_path} cannot be exported as gguf, because {reason}; llama.cpp would "
        "compute other ids. Serve the model with llava instead."
    )


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, stop: str | None) -> list[int]:
    """Ids that end an answer, as in the engine: end of sequence, and the stop string if it is one special token."""
    configured = getattr(generation, "eos_token_id", None)
    special = {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)), **tokenizer.get_added_vocab()}
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured]), special.get(stop)]
    return list(dict.fromkeys(token for token in ends if token is not None))


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]) -> None:
    """Add tokenizer, special tokens and chat template to `writer` for a table of `rows` rows.

    Entries without a row are left out; rows without an entry are named `[PADn]` and never tokenized. Raises
    `ConfigError` for a tokenizer that llama.cpp does not support.
    """
    if len(ends) > len(ENDS):
        raise refused(tokenizer, f"{len(ends)} tokens end an answer, and a GGUF file has {len(ENDS)}")
    if hasattr(tokenizer, "sp_model"):
        entry = _add_sentencepiece(writer, tokenizer)
    elif tokenizer.is_fast:
        entry = _add_byte_level(writer, tokenizer)
    else:
        raise refused(tokenizer, f"it is a {type(tokenizer).__name__} without a tokenizer.json")
    texts, scores, types = zip(*_entries(tokenizer, rows, entry))
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for kind in ("bos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and token < rows:
            getattr(writer, f"add_{kind}_token_id")(token)
    for kind, token in zip(ENDS, ends):
        getattr(writer, f"add_{kind}_token_id")(token)
    ids = tokenizer("").input_ids
    writer.add_add_bos_token(bool(bos_prefix(tokenizer)))
    writer.add_add_eos_token(len(ids) > len(bos_prefix(tokenizer)))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _entries(tokenizer: PreTrainedTokenizerBase, rows: int, entry: Callable[[int], Entry | None]) -> Iterator[Entry]:
    kinds, more = require("gguf", "export").TokenType, tokenizer.added_tokens_decoder
    for index in range(rows):
        added, found = more.get(index), entry(index)
        if found is not None and (added is None or found[0] == added.content) and found[2] != kinds.NORMAL:
            yield found
        elif added is not None:
            yield added.content, ADDED_SCORE, kinds.CONTROL if added.special else kinds.USER_DEFINED
        else:
            yield found or (f"[PAD{index}]", ADDED_SCORE, kinds.UNUSED)


def _add_sentencepiece(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Entry | None]:
    model = import_protobuf().ModelProto.FromString(Path(tokenizer.vocab_file).read_bytes())
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise refused(tokenizer, "its SentencePiece model is not BPE")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise refused(tokenizer, "its SentencePiece model normalizes text")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(normalizer.add_dummy_prefix)
    # Both formats number the types of pieces alike: normal, unknown, control, user-defined, unused, byte.
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    return dict(enumerate(pieces)).get


def _add_byte_level(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Entry | None]:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, decoder = data["model"], data["decoder"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback") or decoder.get("type") != "ByteLevel":
        raise refused(tokenizer, "it is not byte-level BPE and has no tokenizer.model")
    if data["normalizer"] is not None:
        raise refused(tokenizer, f"it normalizes text ({data['normalizer']['type']})")
    before = data["pre_tokenizer"] or {}
    steps = [{**step} for step in before.get("pretokenizers", [before])]
    for step in steps:
        step.pop("trim_offsets", None)  # has no effect on ids
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if name is None:
        raise refused(tokenizer, f"its pre-tokenizer is not {' or '.join(PRE_TOKENIZERS)}'s")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    merges = model["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    normal = require("gguf", "export").TokenType.NORMAL
    return {index: (text, 0.0, normal) for text, index in model["vocab"].items()}.get
