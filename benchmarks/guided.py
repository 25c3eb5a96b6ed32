"""Structured output: valid answers of many, and its cost per token: `python -m benchmarks.guided --model-path DIR`.

Sampled requests follow a JSON schema. In turns, the same number of tokens in the same batches is generated with the
schema and without; the neighbours without a schema must get the tokens that they get alone. DIR may be a language
model, such as the playground's SmolLM2 with `--text-only`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import jsonschema_rs

from llava.engine import Engine, Request, SamplingParams
from llava.engine.arguments import EngineArgs
from llava.engine.sequence import GuidedDecodingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "category": {"enum": ["animal", "vehicle", "food", "person", "other"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colors": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        "indoors": {"type": "boolean"},
    },
    "required": ["title", "category", "count", "colors", "indoors"],
    "additionalProperties": False,
}
GUIDE = GuidedDecodingParams(json=SCHEMA)


def request(seed: int, tokens: int, *, guided: bool) -> Request:
    prompt = f"USER: Describe image {seed} as JSON with title, category, count, colors and indoors. ASSISTANT:"
    params = SamplingParams(tokens, 1.0, seed=seed, guided_decoding=GUIDE if guided else None)
    return Request(prompt, params=params, cache_prefix=False)


def count_valid(engine: Engine, requests: int) -> int:
    answers = engine.generate([request(seed, 256, guided=True) for seed in range(requests)])
    valid = 0
    for answer in answers:
        try:
            valid += jsonschema_rs.is_valid(SCHEMA, json.loads(answer.text))
        except json.JSONDecodeError:
            print(f"not JSON ({answer.finish_reason}): {answer.text[:100]!r}")
    return valid


def cost_ratio(engine: Engine, turn: int) -> float:
    """Seconds with the schema over those without, for answers of the same lengths."""
    seeds = range(turn * engine.max_batch_size, (turn + 1) * engine.max_batch_size)
    start = time.perf_counter()
    answers = engine.generate([request(seed, 256, guided=True) for seed in seeds])
    guided = time.perf_counter() - start
    lengths = [len(answer.token_ids) for answer in answers]
    with mock.patch.object(engine.special, "end", frozenset()):  # answers end by their length only
        start = time.perf_counter()
        plain = engine.generate([request(seed, length, guided=False) for seed, length in zip(seeds, lengths)])
        ratio = guided / (time.perf_counter() - start)
    assert [len(answer.token_ids) for answer in plain] == lengths
    return ratio


def neighbours_agree(engine: Engine) -> bool:
    """Whether rows without a schema get the tokens that they get alone, in a batch that is half guided."""
    mixed = [request(seed, 40, guided=seed % 2 == 1) for seed in range(engine.max_batch_size)]
    together = engine.generate(mixed)
    plain = [one for one in mixed if one.params.guided_decoding is None]
    alone = [engine.generate([replace(one)])[0].token_ids for one in plain]
    return [answer.token_ids for answer in together[::2]] == alone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guided", description=__doc__)
    EngineArgs.add_cli_args(parser)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args(argv)
    engine = EngineArgs.from_cli_args(args).build_engine()
    print(f"valid answers: {count_valid(engine, args.requests)} of {args.requests}")
    ratios = [cost_ratio(engine, turn) for turn in range(args.turns)]
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"time with the schema: {statistics.median(ratios):.3f} x ({each})")
    print(f"neighbours unaffected: {neighbours_agree(engine)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
