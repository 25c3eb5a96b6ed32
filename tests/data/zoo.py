"""Small tokenizers of all supported families, trained on the fly."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

CORPUS = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,
detailed, and polite answers to the user's questions. USER: What color is the shape? ASSISTANT: The shape is red.
Human: Is there a blue circle? Assistant: no. ### [INST] <<SYS>> [/INST] <human>: <bot>: 1 2 3 <image> ### Human
system user assistant Answer the questions. A small image of a cat on a mat, two dogs and 37 birds. Why? So."""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<eoh>", "<eoa>"]


@cache
def _directory() -> TemporaryDirectory[str]:
    return TemporaryDirectory()  # deleted at exit, with the cache


@cache
def sentencepiece_file(normalization: str = "identity") -> str:
    """A LLaMA-like model: identity normalizer by default, byte fallback, 384 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 4),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = Path(_directory().name) / normalization / "tokenizer.model"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.getvalue())
    return str(path)


def _llama(legacy: bool) -> Any:
    return LlamaTokenizer(sentencepiece_file(), legacy=legacy)


def _llama_special() -> Any:
    tokenizer = LlamaTokenizer(sentencepiece_file(), legacy=False, add_bos_token=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def _byte_bpe(special: list[str], bos: str | None = None, trim_offsets: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines() * 4, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _chatml() -> Any:
    """Like SmolLM2: adds no BOS, although `bos_token` starts every ChatML turn."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(SPECIAL), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def _llama3() -> Any:
    special = ["<|begin_of_text|>", "</s>", *SPECIAL]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(special, "<|begin_of_text|>"), bos_token="<|begin_of_text|>", eos_token="</s>"
    )


def _gpt2_slow() -> Any:
    fast = _byte_bpe([])
    folder = Path(_directory().name) / "gpt2"
    folder.mkdir(exist_ok=True)
    fast.model.save(str(folder))
    tokenizer = GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="</s>", bos_token="</s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


MAKERS: dict[str, Callable[[], Any]] = {
    "llama-legacy": lambda: _llama(True),
    "llama-new": lambda: _llama(False),
    "llama-fast": lambda: LlamaTokenizerFast(sentencepiece_file()),
    "llama-special-no-bos": _llama_special,
    "chatml-byte-bpe": _chatml,
    "llama3-like": _llama3,
    "gpt2-slow": _gpt2_slow,
}


@cache
def make(name: str) -> Any:
    """The tokenizer `name` of `MAKERS`, cached."""
    tokenizer = MAKERS[name]()
    tokenizer.model_max_length = 10**6
    return tokenizer
