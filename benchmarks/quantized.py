"""8-bit and 4-bit decoding on the CPU against bfloat16, one stream: `python -m benchmarks.quantized [DIRECTORY]`.

DIRECTORY is a LLaMA checkpoint, by default the output of `python -m playground.convert_smollm2`; a second model has
random weights and is larger than a processor's caches. All precisions are in memory and take turns. The floor reads
each weight once per token at the bandwidth of a matrix-vector product measured in the same run. Exits with status 1
below 1.5 and 2 times the tokens per second of bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.decode import PROMPT, SMOLLM2
from benchmarks.floor import Peaks, decode_floor, peaks
from llava.engine import Engine, Request, SamplingParams
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.quantization import Quantizer

CPU = torch.device("cpu")
WANTED = {8: 1.5, 4: 2.0}  # times the tokens per second of bfloat16


def random_model(width: int, layers: int) -> LlavaLlamaForCausalLM:
    """A bfloat16 LLaMA of random weights with Vicuna's proportions and vocabulary, and a head size of 64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlavaLlamaForCausalLM(
            LlavaConfig(
                vocab_size=32000,
                hidden_size=width,
                intermediate_size=width * 43 // 16 // 64 * 64,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                max_position_embeddings=2048,
            )
        )
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval()
    return model


def quantized(model: LlavaLlamaForCausalLM, bits: int) -> LlavaLlamaForCausalLM:
    """A copy of the model with its decoder in 8 or 4 bit, as `--load-8bit` and `--load-4bit` load it."""
    packed, quantizer = copy.deepcopy(model), Quantizer(bits, model.dtype, CPU)
    for name, parameter in list(model.named_parameters()):
        quantizer.quantize_on_load(packed, name, parameter.data, CPU)
    return packed


@torch.inference_mode()
def decode(engine: Engine, ids: list[int], tokens: int) -> tuple[float, tuple[int, ...]]:
    """Seconds per decode step, without the prefill, and the greedy tokens."""
    handle = engine.submit(Request(ids, params=SamplingParams(tokens + 2)))
    engine.step()
    start = time.perf_counter()
    steps = 0
    while not handle.done:
        engine.step()
        steps += 1
    return (time.perf_counter() - start) / steps, handle.result().token_ids


def measure(name: str, model: LlavaLlamaForCausalLM, ids: list[int], tokenizer: object, peak: Peaks, turns: int,
            tokens: int) -> dict[int, float]:  # fmt: skip
    """Print a line per precision, and return the median ratio to bfloat16 by number of bits."""
    models = {16: model, **{bits: quantized(model, bits) for bits in WANTED}}
    engines = {bits: Engine(each, tokenizer, prefix_cache_bytes=0) for bits, each in models.items()}
    seconds: dict[int, list[float]] = {bits: [] for bits in engines}
    answers = {}
    for turn in range(-1, turns):
        for bits, engine in engines.items():
            engine.special.end = frozenset()  # a fixed length
            each, answers[bits] = decode(engine, ids, tokens)
            if turn >= 0:
                seconds[bits].append(each)
    ratios = {}
    for bits, found in seconds.items():
        pairs = sorted(plain / each for plain, each in zip(seconds[16], found, strict=True))
        median, floor = statistics.median(found), decode_floor(models[bits], peak)
        same = sum(one == other for one, other in zip(answers[16], answers[bits], strict=True)) / len(answers[bits])
        ratios[bits] = statistics.median(pairs)
        print(
            f"| {name}, {bits} bit | {1 / median:.1f} /s | {ratios[bits]:.2f} ({pairs[0]:.2f}-{pairs[-1]:.2f}) | "
            f"{1 / floor:.0f} /s, {floor / median:.0%} | {same:.0%} |",
            flush=True,
        )
    return ratios


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=SMOLLM2)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="per turn")
    parser.add_argument("--width", type=int, default=2048, help="of the random model; 0 leaves it out")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--quick", action="store_true", help="a smoke test: its floor and ratios mean nothing")
    args = parser.parse_args(argv)
    peak = peaks(torch.bfloat16, 64 if args.quick else 2048)
    tokenizer = AutoTokenizer.from_pretrained(args.directory)
    ids = tokenizer(PROMPT).input_ids
    print(f"reads {peak.read / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")
    print("| one stream | decoding | / bfloat16 | floor, reached | equal tokens |", "|---|---|---|---|---|", sep="\n")
    config = LlavaConfig.from_pretrained(args.directory)
    small = LlavaLlamaForCausalLM.from_pretrained(args.directory, config=config, torch_dtype=torch.bfloat16).eval()
    found = [measure(args.directory.name, small, ids, tokenizer, peak, args.turns, args.tokens)]
    if args.width:
        large, name = random_model(args.width, args.layers), f"width {args.width}"
        limited = [number % 32000 for number in ids]
        found.append(measure(name, large, limited, tokenizer, peak, args.turns, args.tokens))
    return int(not args.quick and any(ratios[bits] < least for ratios in found for bits, least in WANTED.items()))


if __name__ == "__main__":
    raise SystemExit(main())
