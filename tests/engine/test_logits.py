"""Biases, penalties, top-k, min-p and log probabilities: against transformers' processors and plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava.engine import Engine, Request, SamplingParams
from llava.engine.logits import TokenTable, adjust_logits, download, table_columns, token_logprobs
from llava.engine.sampling import Sampler, make_generator, sample_top_p
from llava.errors import RequestError

MakeEngine = Callable[..., Engine]
VOCABULARY = 40
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
PENALTY = st.floats(-2, 2)


def table_of(params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> TokenTable | None:
    table = TokenTable.build(params, prompt)
    for token in generated:
        if table is not None:
            table.append(token)
    return table


def by_the_formulas(logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """One row (V,): the bias, transformers' repetition penalty, and OpenAI's two penalties one token at a time."""
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    ids = torch.tensor([[*prompt, *generated]])
    if ids.numel():
        logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits.unsqueeze(0))[0]
    for token in set(generated):
        logits[token] -= generated.count(token) * params.frequency_penalty + params.presence_penalty
    return logits


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_biases_and_penalties_follow_their_formulas(data: st.DataObject) -> None:
    """Every row has its own parameters and history; some have none."""
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        params = SamplingParams(
            presence_penalty=data.draw(st.just(0.0) | PENALTY),
            frequency_penalty=data.draw(st.just(0.0) | PENALTY),
            repetition_penalty=data.draw(st.just(1.0) | st.floats(0.1, 10)),
            logit_bias=data.draw(st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4)),
        )
        rows.append((params, data.draw(TOKENS), data.draw(TOKENS)))
    logits = 5 * torch.randn(
        len(rows), VOCABULARY, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    tables = [table_of(*row) for row in rows]
    found = logits.clone()
    if columns := table_columns(tables):
        adjust_logits(found, *(torch.as_tensor(column) for column in columns))
    expected = torch.stack([by_the_formulas(row, *given) for row, given in zip(logits, rows, strict=True)])
    torch.testing.assert_close(found, expected)
    for row, table in enumerate(tables):
        assert table is not None or torch.equal(found[row], logits[row])
    params = [params for params, _, _ in rows]
    before = logits.clone()
    assert torch.equal(Sampler(params, [None] * len(rows), tables).sample(logits), found.argmax(-1))
    assert torch.equal(logits, before)  # log probabilities are computed from them


def test_images_of_a_prompt_are_no_tokens() -> None:
    table = TokenTable.build(SamplingParams(repetition_penalty=2.0), [1, -200, 3])
    assert table is not None and table.columns(0)[1].tolist() == [1, 3]
    assert TokenTable.build(SamplingParams(), [1]) is None


def by_the_warpers(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,) after transformers' warpers, and min-p over their result."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    warped = warpers(torch.zeros(1, 0, dtype=torch.long), logits.unsqueeze(0))[0]
    probabilities = warped.softmax(-1)
    kept = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return kept / kept.sum()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    top_k=st.integers(0, 60),
    top_p=st.just(1.0) | st.floats(0.05, 0.99),
    min_p=st.just(0.0) | st.floats(0.01, 1.0),
    temperature=st.floats(0.2, 3),
)
def test_top_k_and_min_p_keep_what_the_warpers_keep(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    """On the CPU the token is `torch.multinomial`'s; together, rows draw by the inverse of the same distribution."""
    logits = 2 * torch.randn(2, 50, generator=torch.Generator().manual_seed(seed))
    params = [
        SamplingParams(8, temperature, top_p, seed, top_k=top_k, min_p=min_p),
        SamplingParams(8, temperature, seed=1),
    ]
    expected = [by_the_warpers(row, one) for row, one in zip(logits, params, strict=True)]
    drawn = Sampler(params, [make_generator(one) for one in params]).sample(logits)
    for row, one in enumerate(params):
        assert int(torch.multinomial(expected[row], 1, generator=make_generator(one))) == drawn[row]
    for draw in (0.0, 0.5, 1 - 2**-24):
        columns = [
            torch.tensor([getattr(one, name) for one in params]) for name in ("temperature", "top_p", "top_k", "min_p")
        ]
        found = sample_top_p(logits, columns[0], columns[1], torch.tensor([draw, draw]), columns[2], columns[3].float())
        for row, token in enumerate(found.tolist()):
            ordered = expected[row].sort(descending=True, stable=True)
            ends, at = ordered.values.cumsum(-1), int((ordered.indices == token).nonzero())
            assert expected[row][token] > 0
            assert (ends[at - 1] if at else 0.0) - 1e-5 <= draw <= ends[at] + 1e-5


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(3, 30, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, -1, 7])
    params = [SamplingParams(logprobs=2), SamplingParams(), SamplingParams(logprobs=0)]
    expected = logits.float().log_softmax(-1)
    found, logprobs = download(tokens, token_logprobs(logits, tokens, 2), params)
    assert found == [4, -1, 7] and logprobs[1] is None
    assert logprobs[0] is not None and logprobs[2] is not None
    best = expected[0].topk(2)
    assert logprobs[0] == (4, expected[0, 4].item(), tuple(zip(best.indices.tolist(), best.values.tolist())))
    assert logprobs[2] == (7, expected[2, 7].item(), ())


PROMPTS: tuple[list[int], ...] = ([1, 300, 301, 302], [1, 310, 300, 311, 312], [1, 305])


@torch.no_grad()
def test_answers_report_the_models_log_probabilities(engine: Engine, parts: tuple[Any, Any, Any]) -> None:
    """Of the raw logits, whatever is sampled from; and what streams is what the completion holds."""
    params = SamplingParams(8, 1.5, seed=3, logprobs=4, top_k=5, logit_bias={330: 50}, repetition_penalty=1.5)
    handles = [engine.submit(Request(ids, params=params)) for ids in PROMPTS]
    taken = [[] for _ in handles]  # type: list[list[Any]]
    while engine.step():
        for handle, into in zip(handles, taken, strict=True):
            into += handle.take_logprobs()
    for ids, handle, streamed in zip(PROMPTS, handles, taken, strict=True):
        answer = handle.result()
        streamed += handle.take_logprobs()
        assert answer.logprobs is not None and streamed == list(answer.logprobs)
        tokens = [token for token in answer.token_ids if token not in engine.special.end]
        assert [one.token for one in answer.logprobs] == tokens and tokens
        logits = parts[0](torch.tensor([[*ids, *tokens]])).logits[0].float().log_softmax(-1)
        for row, one in zip(logits[len(ids) - 1 :], answer.logprobs):
            best = row.topk(4)
            assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_greedy_answers_with_a_repetition_penalty_are_those_of_transformers(
    engine: Engine, parts: tuple[Any, Any, Any]
) -> None:
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = engine.generate([Request(ids, params=SamplingParams(20)) for ids in PROMPTS])
    found = engine.generate([Request(ids, params=SamplingParams(20, repetition_penalty=1.8)) for ids in PROMPTS])
    assert [one.token_ids for one in found] != [one.token_ids for one in plain]
    for ids, answer in zip(PROMPTS, found, strict=True):
        expected = parts[0].generate(torch.tensor([ids]), repetition_penalty=1.8, **options)[0, len(ids) :]
        assert list(answer.token_ids) == expected.tolist()


def test_neighbours_do_not_change_an_answer(make_engine: MakeEngine) -> None:
    """Each request in a batch of different parameters returns what it returns alone."""
    params = [
        SamplingParams(12),
        SamplingParams(12, 1.2, seed=5),
        SamplingParams(12, logit_bias={340: 30}, presence_penalty=2.0),
        SamplingParams(12, 1.2, seed=6, top_k=3, min_p=0.1),
        SamplingParams(12, 1.0, seed=7, frequency_penalty=1.5, logprobs=2),
        SamplingParams(12, repetition_penalty=1.3, logprobs=0),
    ]
    requests = [Request([1, 300 + n, 305], params=one) for n, one in enumerate(params)]
    together = make_engine(max_batch_size=6).generate(requests)
    alone = [make_engine().generate([request])[0] for request in requests]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
    assert len({one.token_ids for one in together}) == len(params)


def test_a_bias_bans_and_forces_tokens(engine: Engine) -> None:
    forced = engine.generate([Request([1, 300], params=SamplingParams(5, logit_bias={333: 100}))])[0]
    assert forced.token_ids == (333,) * 5
    banned = engine.generate(
        [Request([1, 300], params=SamplingParams(5, logit_bias={333: 100}, frequency_penalty=2.0))]
    )[0]
    assert banned.token_ids == (333,) * 5  # 8 less after four tokens does not outweigh 100
    with pytest.raises(RequestError, match=r"Token ids of logit_bias must be in \[0, 383\], got 384"):
        engine.submit(Request([1], params=SamplingParams(logit_bias={384: 1})))


def test_records_have_the_new_parameters_only_where_they_are_set() -> None:
    """Answers of earlier versions can be resumed."""
    published = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": None, "stop": (), "num_beams": 1}
    assert SamplingParams(4).as_dict() == published
    assert len({SamplingParams(4), SamplingParams(4), SamplingParams(5)}) == 2
    assert SamplingParams(4, top_k=3, logit_bias={1: 2}).as_dict() == {**published, "top_k": 3, "logit_bias": {1: 2}}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": "1"},
        {"logprobs": 21},
        {"logit_bias": {1: 101}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": None},
        {"guided_decoding": {"regex": "a"}},
        {"num_beams": 2, "top_k": 3},
    ],
    ids=str,
)
def test_invalid_parameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)
