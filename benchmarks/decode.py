"""Single-stream decoding, tokens per second of the engine and of `generate`: `python -m benchmarks.decode [DIRECTORY]`.

DIRECTORY is a LLaMA checkpoint, by default the output of `python -m playground.convert_smollm2`. The floor reads every
weight once per token at the bandwidth of a matrix-vector product measured in the same run. In float32 the tokens must
agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.floor import decode_floor, peaks
from llava.engine import Engine, Request, SamplingParams
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

SMOLLM2 = Path("pretrained/smollm2-135m-instruct")
PROMPT = "The history of the city of Paris begins"


@dataclass
class Rates:
    """Tokens per second of each turn."""

    generate: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    floor: float = 0.0
    same: bool = True

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.generate), statistics.median(self.engine)


def measure(directory: Path, dtype: torch.dtype, turns: int, tokens: int, width: int) -> Rates:
    """Alternate engine and `generate` after a warm-up turn; `width` is the matrix size for measuring the peaks."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = LlavaConfig.from_pretrained(directory)
    model = LlavaLlamaForCausalLM.from_pretrained(directory, config=config, torch_dtype=dtype).eval()
    engine = Engine(model, tokenizer, prefix_cache_bytes=0, feature_cache_bytes=0)
    engine.special.end = frozenset()  # fixed answer length on both sides
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    rates = Rates(floor=1 / decode_floor(model, peaks(dtype, width)))
    for turn in range(-1, turns):
        start = time.perf_counter()
        expected = _generate(model, ids, tokens)
        between = time.perf_counter()
        found = engine.generate([Request(ids[0].tolist(), params=SamplingParams(tokens))])[0].token_ids
        end = time.perf_counter()
        rates.same &= list(found) == expected
        if turn >= 0:
            rates.generate.append(tokens / (between - start))
            rates.engine.append(tokens / (end - between))
    return rates


@torch.inference_mode()
def _generate(model: Any, ids: torch.Tensor, tokens: int) -> list[int]:
    out = model.generate(ids, do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=SMOLLM2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a smoke test: its floor means nothing")
    args = parser.parse_args(argv)
    print("| one stream | generate | engine | ratio | floor, reached |", "|---|---|---|---|---|", sep="\n")
    whole = True
    for dtype in (torch.float32, torch.bfloat16):
        rates = measure(args.directory, dtype, args.turns, args.tokens, 64 if args.quick else 2048)
        whole &= rates.same or dtype is not torch.float32
        theirs, ours = rates.medians
        same = "same tokens" if rates.same else "OTHER TOKENS"
        name = str(dtype).removeprefix("torch.")
        print(
            f"| {name} ({same}) | {theirs:.1f} /s | {ours:.1f} /s | {ours / theirs:.2f} | {rates.floor:.0f} /s, "
            f"{ours / rates.floor:.0%} |",
            flush=True,
        )
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
