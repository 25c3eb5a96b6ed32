"""Structured output: answers follow their grammar, with SentencePiece and with byte-level tokenizers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from transformers import LlamaTokenizer

from llava.engine import Engine, Request, SamplingParams
from llava.engine.detokenizer import SpecialTokens, token_bytes
from llava.engine.guided import GrammarCompiler
from llava.engine.sequence import GuidedDecodingParams
from llava.errors import RequestError
from llava.model.builder import load_pretrained_model
from tests import tiny

pytest.importorskip("llguidance")

MakeEngine = Callable[..., Engine]
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue", "grün"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "name": {"type": "string", "maxLength": 6},
        "parts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "none": {"const": None},
    },
    "required": ["color", "count", "name", "parts", "none"],
    "additionalProperties": False,
}
JSON = GuidedDecodingParams(json=SCHEMA)


@pytest.fixture(scope="module")
def engines(
    parts: tuple[Any, Any, Any], tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Engine]:
    """Of a model with a SentencePiece tokenizer, and of one with a byte-level BPE."""
    mpt = tiny.make_mpt_chat(tmp_path_factory.mktemp("guided") / "mpt", tiny_dirs["tower"])
    tokenizer, model, processor, _ = load_pretrained_model(mpt, device="cpu")
    return {
        "sentencepiece": Engine(*parts, max_batch_size=8),
        "byte-level": Engine(model, tokenizer, processor, max_batch_size=8),
    }


def ask(guide: GuidedDecodingParams, seed: int, tokens: int = 400, **options: Any) -> Request:
    params = SamplingParams(tokens, 1.0, seed=seed, guided_decoding=guide, **options)
    return Request([1, 300 + seed % 50, 301], params=params)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_sampled_answers_are_valid(engines: dict[str, Engine], kind: str) -> None:
    """Random weights, so that nothing but the grammar makes the answers valid."""
    answers = engines[kind].generate([ask(JSON, seed) for seed in range(24)])
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(jsonschema_rs.is_valid(SCHEMA, json.loads(answer.text)) for answer in answers)
    assert len({answer.text for answer in answers}) == len(answers)
    assert [list(json.loads(answer.text)) for answer in answers] == [list(SCHEMA["properties"])] * len(answers)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_choices_and_expressions(engines: dict[str, Engine], kind: str) -> None:
    choices = ["yes", "no", "a/b", 'not "sure"', "漢字", "no way"]
    chosen = engines[kind].generate([ask(GuidedDecodingParams(choice=choices), seed, 40) for seed in range(16)])
    assert {answer.text for answer in chosen} <= set(choices) and len({answer.text for answer in chosen}) > 2
    assert all(answer.finish_reason == "stop" for answer in chosen)
    for regex in (r"\d{3}-\d{4}", r"^[a-c]{2,5}$", r"https?://[a-z]{1,3}/é"):
        found = engines[kind].generate([ask(GuidedDecodingParams(regex=regex), seed, 60) for seed in range(4)])
        assert all(re.fullmatch(regex, answer.text) for answer in found), [answer.text for answer in found]


def test_greedy_and_penalised_answers_follow_the_grammar_too(engines: dict[str, Engine]) -> None:
    """A bias of a token that the grammar forbids changes nothing."""
    guide = GuidedDecodingParams(choice=["yes", "no"])
    for options in ({"logit_bias": {333: 100}}, {"repetition_penalty": 2.0, "presence_penalty": 2.0}):
        (answer,) = engines["sentencepiece"].generate(
            [Request([1, 300], params=SamplingParams(30, guided_decoding=guide, **options))]
        )
        assert answer.text in ("yes", "no") and answer.finish_reason == "stop"


def test_the_length_limit_ends_a_structure(engines: dict[str, Engine]) -> None:
    (answer,) = engines["sentencepiece"].generate([ask(JSON, 0, 3)])
    assert answer.finish_reason == "length" and len(answer.token_ids) == 3
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


def test_neighbours_of_a_structured_answer_are_unaffected(make_engine: MakeEngine) -> None:
    """Rows with and without a grammar in one batch return the tokens that each returns alone."""
    plain = [Request([1, 310 + n], params=SamplingParams(30, temperature=n % 2, seed=n)) for n in range(3)]
    guided = [
        ask(JSON, 1),
        ask(GuidedDecodingParams(regex="[ab ]{20}"), 2, 60, logprobs=1),
        ask(GuidedDecodingParams(choice=["x", "xy"]), 3),
    ]
    requests = [request for pair in zip(plain, guided, strict=True) for request in pair]
    together = make_engine(max_batch_size=6).generate(requests)
    engine = make_engine()
    assert [one.token_ids for one in together] == [engine.generate([request])[0].token_ids for request in requests]


def test_an_answer_ends_with_the_tokens_of_its_template(engines: dict[str, Engine]) -> None:
    """A stop string that is a special token ends an open structure, and appears nowhere else."""
    engine = engines["byte-level"]
    guide = GuidedDecodingParams(regex="[a-z]+")
    (end,) = engine.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    request = Request(
        [1, 300], params=SamplingParams(50, logit_bias={end: 100}, stop=("<|im_end|>",), guided_decoding=guide)
    )
    (answer,) = engine.generate([request])
    assert answer.token_ids[-1] == end and re.fullmatch("[a-z]+", answer.text) and len(answer.token_ids) == 2


def test_white_space_in_json_is_bounded(engines: dict[str, Engine]) -> None:
    engine = engines["byte-level"]
    for space, most in ((30 * " ", 20), ("\n" + 30 * "\t", 21), ("\n\n", 1), ("\r\n  ", 4)):
        guide = engine.grammars.start(JSON, frozenset())
        tokens = [engine.token_bytes.index(byte.encode()) for byte in '{"color":' + space]
        assert guide.matcher.try_consume_tokens(tokens) == len('{"color":') + most


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        ({"json": {"type": "strange"}}, "The JSON schema cannot be used: Invalid type: strange"),
        ({"json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"$ref": "https://example.org/a"}}, "not present in a registry"),
        ({"json": "[1]"}, "it is not an object"),
        ({"json": "{"}, "The JSON schema cannot be used: Expecting property name"),
        ({"regex": "[a"}, 'The regular expression cannot be used: invalid regex "[a"'),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"choice": []}, "choice must be a list of texts"),
        ({"choice": "yes"}, "choice must be a list of texts"),
        ({}, "takes one of json, regex and choice, got none"),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice"),
    ],
    ids=str,
)
def test_what_is_no_structure_is_refused_with_the_reason(
    engines: dict[str, Engine], guide: dict[str, Any], words: str
) -> None:
    engine = engines["sentencepiece"]
    with pytest.raises(RequestError) as refused:
        engine.submit(Request([1], params=SamplingParams(guided_decoding=GuidedDecodingParams(**guide))))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not engine.step()


def test_without_the_library_a_sentence_says_what_to_install(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"llguidance, which is not installed; run: pip install llava\[serve\]"):
        make_engine().submit(ask(JSON, 0))


def test_a_tokenizer_of_another_kind_is_refused(parts: tuple[Any, Any, Any]) -> None:
    tokenizer = parts[1]
    special, tokens = SpecialTokens(tokenizer, None), token_bytes(tokenizer)
    with pytest.raises(RequestError, match="not supported for the tokenizer LlamaTokenizer"):
        GrammarCompiler(tokenizer, [token.replace(b" ", b"_") for token in tokens], special, len(tokens))


def test_a_grammar_that_fails_ends_its_answer_only(engines: dict[str, Engine]) -> None:
    """As one does that exceeds llguidance's limits in the middle of an answer."""
    engine = engines["sentencepiece"]
    failing, other = engine.submit(ask(GuidedDecodingParams(regex="[a-z]{30}"), 1)), engine.submit(ask(JSON, 2))
    engine.step()
    sequence = next(one for one in engine._running if one.handle is failing)
    assert sequence.guide is not None and not sequence.guide.matcher.consume_token(engine.token_bytes.index(b"{"))
    answer = failing.result()
    assert answer.finish_reason == "error" and "too complex" in str(answer.error)
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(other.result().text))


@pytest.mark.parametrize("text", ['{"a": [1, 2]}', "  two  spaces\n\ttabs", "é漢😀 naïve", "<0x0A> literally"])
def test_the_bytes_of_tokens_join_to_the_text(engines: dict[str, Engine], text: str) -> None:
    for engine in engines.values():
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(engine.token_bytes[token] for token in ids).decode()
        assert joined.lstrip(" ") == text.lstrip(" ")


def test_vicunas_tokenizer(vicuna_tokenizer_file: Path) -> None:
    tokenizer = LlamaTokenizer(str(vicuna_tokenizer_file), legacy=False)
    tokens = token_bytes(tokenizer)
    compiler = GrammarCompiler(tokenizer, tokens, SpecialTokens(tokenizer, None), 32_001)
    text = '{"color": "red", "count": 12, "name": "é", "parts": [true],\n "none": null}'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokens[ids[0]] == b' {"'  # SentencePiece's space before the first word
    guide = compiler.start(JSON, frozenset({2}))
    assert guide.matcher.try_consume_tokens(ids) == len(ids) and guide.is_complete
    assert len(tokens) == 32_000 and torch.tensor(tokens[13][0]) == 10  # <0x0A>
