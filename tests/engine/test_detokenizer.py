"""Detokenization and clean-up: complete characters, stop strings across tokens, the same text for any pieces."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava.engine.detokenizer import Detokenizer, SpecialTokens, TextStream

QUICK = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A fast byte-level BPE, as SmolLM2 and Qwen have, with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red circle is in the image, the blue one is not"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")


def pieces_of(tokenizer: Any, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, SpecialTokens(tokenizer, None), context or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@QUICK
@given(ids=st.lists(st.integers(0, 383), max_size=40))
def test_pieces_join_to_the_decoded_whole(parts: tuple[Any, Any, Any], ids: list[int]) -> None:
    tokenizer = parts[1]
    kept = [token for token in ids if token not in tokenizer.all_special_ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(kept, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def other_tokenizers(parts: tuple[Any, Any, Any]) -> list[Any]:
    """SentencePiece with added tokens, which are set apart by spaces; WordPiece, which joins words by spaces; and BPE
    with ends of words, which are spaces unless they are the last."""
    added = deepcopy(parts[1])
    added.add_tokens(["<extra>", "word"])
    words = ["[UNK]", "[PAD]", "a", "red", "##s", "##ing", ",", "circle", "##1"]
    pieces = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece(cleanup=False)
    ends = ["[UNK]", "[PAD]", "a", "red</w>", "s", "s</w>", "circle</w>"]
    bpe = Tokenizer(models.BPE({end: at for at, end in enumerate(ends)}, [], unk_token="[UNK]"))
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    fast = [
        PreTrainedTokenizerFast(tokenizer_object=one, unk_token="[UNK]", pad_token="[PAD]") for one in (pieces, bpe)
    ]
    return [added, *fast]


@QUICK
@given(data=st.data())
def test_pieces_join_with_tokens_that_depend_on_their_neighbours(other_tokenizers: list[Any], data: Any) -> None:
    tokenizer = data.draw(st.sampled_from(other_tokenizers))
    names = ["\u2581", "\u2581\u2581", "\u2581a", "a", "<0xE7>", "<0x8C>", "<0xAB>", "<0x0A>", "<extra>", "word"]
    found = [tokenizer.convert_tokens_to_ids(name) for name in names]
    odd = [token for token in found if token not in (None, tokenizer.unk_token_id)]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(odd), st.integers(0, len(tokenizer) - 1)), max_size=8))
    kept = [token for token in ids if token not in tokenizer.all_special_ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(kept, clean_up_tokenization_spaces=False)


@QUICK
@given(context=st.lists(st.integers(3, 383), max_size=12), ids=st.lists(st.integers(3, 383), max_size=12))
def test_pieces_after_a_context_continue_its_text(
    parts: tuple[Any, Any, Any], context: list[int], ids: list[int]
) -> None:
    """In SentencePiece the first token of a text loses the space before its word, the others keep it."""
    tokenizer = parts[1]
    before, whole = (tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (context, [*context, *ids]))
    assume(not before.endswith("\ufffd") and whole.startswith(before))
    assert before + "".join(pieces_of(tokenizer, ids, context)) == whole


def test_white_space_stays_at_both_ends_if_wanted() -> None:
    for strip, text in ((True, "a b"), (False, " \n a b  ")):
        stream = TextStream(["END"], strip=strip)
        assert "".join(map(stream.push, (" ", "\n a", " b ", " EN", "D x"))) == stream.text == text


@QUICK
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_join_with_a_byte_level_tokenizer(byte_level: PreTrainedTokenizerFast, ids: list[int]) -> None:
    expected = byte_level.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(byte_level, ids)) == expected


def test_words_are_decoded_once(byte_level: PreTrainedTokenizerFast) -> None:
    special, ids = SpecialTokens(byte_level, None), byte_level("a red circle is in the image, " * 5).input_ids
    first = Detokenizer(byte_level, special)
    text = "".join(map(first.push, ids))
    with mock.patch.object(byte_level, "decode", wraps=byte_level.decode) as decode:
        again = Detokenizer(byte_level, special)
        assert "".join(map(again.push, ids)) == text
    assert decode.call_count < len(ids) / 4  # behind white space, the window is decoded


@QUICK
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), max_size=20))
def test_characters_are_never_split(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    ids = byte_level(text).input_ids
    assert all("\ufffd" not in piece for piece in pieces_of(byte_level, ids))


def test_characters_of_several_tokens(parts: tuple[Any, Any, Any]) -> None:
    ids = parts[1]("猫 🐈 é", add_special_tokens=False).input_ids
    pieces = pieces_of(parts[1], ids)
    assert len(ids) > len("猫 🐈 é") and "" in pieces and "".join(pieces) == "猫 🐈 é"
    assert "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_becomes_a_replacement_character(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("🐈").input_ids[:-1]
    assert pieces_of(byte_level, ids) == ["", "", "", "\ufffd"]


@QUICK
def clean_text(text: str, stop: list[str]) -> str:
    """The output of `TextStream` for a whole text."""
    stream = TextStream(stop)
    stream.push(text, final=True)
    return stream.text


@given(
    pieces=st.lists(st.text("ab# \n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3),
)
def test_streamed_text_is_the_cleaned_whole(pieces: list[str], stops: list[str]) -> None:
    stream = TextStream(stops)
    shown = []
    for piece in pieces:
        shown.append(stream.push(piece))
        if stream.stopped:
            break
    shown.append(stream.push("", final=True))
    whole = "".join(pieces)
    expected = whole[: min((at for at in map(whole.find, stops) if at >= 0), default=len(whole))].strip()
    assert "".join(shown) == stream.text == expected == clean_text(whole, stops)
    assert stream.stopped == any(text in whole for text in stops)


def test_text_before_a_possible_stop_is_shown_at_once() -> None:
    stream = TextStream(["###"])
    assert [stream.push(piece) for piece in ("one #", "#2", " ##", "# Human:")] == ["one", " ##2", "", ""]
    assert stream.stopped and stream.text == "one ##2"


def test_empty_stop_strings_are_ignored() -> None:
    assert clean_text(" text ", [""]) == "text"


def test_rows_beyond_the_vocabulary_have_no_text(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("red").input_ids
    assert "".join(pieces_of(byte_level, [len(byte_level) + 20, *ids, 10**6])) == "red"


def test_end_ids(byte_level: PreTrainedTokenizerFast) -> None:
    special = SpecialTokens(byte_level, SimpleNamespace(eos_token_id=[7, 8]))
    assert special.end == {1, 7, 8}
    assert special.end_ids(["<|im_start|>", "red"]) == {0, 1, 7, 8}
    assert SpecialTokens(byte_level, None).end == {1}
