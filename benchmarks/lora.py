"""LoRA adapters by request: throughput of a mixed batch against the base alone, in turns: `python -m benchmarks.lora`.

Half of a batch uses the base and the rest two adapters of all linear layers with random weights, made in a temporary
directory. All rows have the same prompts and lengths as in batches of the base alone. Every row of the mixed batch must
get the tokens that it gets alone. DIR may be a language model, such as the playground's SmolLM2 with `--text-only`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from llava.engine import Engine, Request, SamplingParams
from llava.engine.arguments import EngineArgs

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = (None, "first", None, "second")  # of the rows, in turn


def make_adapter(directory: Path, model_path: str, rank: int, seed: int) -> Path:
    """A PEFT adapter of all linear layers, large enough to change most answers."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES))
    shapes = {name: one.shape for name, one in wrapped.state_dict().items() if ".lora_" in name}
    state = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    wrapped.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    return directory


def requests(batch: int, tokens: int, turn: int, *, mixed: bool) -> list[Request]:
    """A prompt for every row; those of one `turn` are the same with and without adapters."""
    params = SamplingParams(tokens)
    return [
        Request(
            f"USER: Tell a story about a boy with {row} apples and {turn} friends. ASSISTANT:",
            params=params,
            cache_prefix=False,
            lora=NAMES[row % len(NAMES)] if mixed else None,
        )
        for row in range(batch)
    ]


def tokens_per_second(engine: Engine, asked: Sequence[Request]) -> float:
    start = time.perf_counter()
    answers = engine.generate(asked)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - start)


def rows_agree(engine: Engine, asked: Sequence[Request]) -> int:
    """Rows that get the tokens in the mixed batch that they get alone."""
    together = [answer.token_ids for answer in engine.generate(asked)]
    alone = [engine.generate([replace(one)])[0].token_ids for one in asked]
    return sum(one == other for one, other in zip(together, alone, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    EngineArgs.add_cli_args(parser)
    add = parser.add_argument
    add("--rank", type=int, default=64, help="rank of both adapters (default %(default)s, that of training)")
    add("--batch", type=int, default=8)
    add("--tokens", type=int, default=128, help="new tokens per row")
    add("--pairs", type=int, default=7)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        paths = [make_adapter(Path(directory, name), args.model_path, args.rank, seed) for seed, name in
                 enumerate(("first", "second"))]  # fmt: skip
        settings = EngineArgs.from_cli_args(args, max_batch_size=args.batch)
        engine = replace(settings, lora={path.name: str(path) for path in paths}).build_engine()
    speeds: dict[bool, list[float]] = {False: [], True: []}
    with mock.patch.object(engine.special, "end", frozenset()):  # answers end by their length only
        for turn in range(args.pairs + 1):
            for mixed in (False, True) if turn % 2 else (True, False):
                speeds[mixed].append(tokens_per_second(engine, requests(args.batch, args.tokens, turn, mixed=mixed)))
            print(f"pair {turn}: {speeds[False][-1]:.1f} and {speeds[True][-1]:.1f} tokens/s", flush=True)
        agreeing = rows_agree(engine, requests(args.batch, args.tokens, 0, mixed=True))
    base, both = (found[1:] for found in speeds.values())  # the first pair warms up
    ratios = [mine / alone for mine, alone in zip(both, base, strict=True)]
    print(
        f"base alone: {statistics.median(base):.1f} tokens/s; with two adapters: {statistics.median(both):.1f} tokens/s"
    )
    each = f"{min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs"
    print(f"ratio, rank {args.rank}, batch {args.batch}: {statistics.median(ratios):.3f} ({each})")
    print(f"rows with the tokens that they get alone: {agreeing} of {args.batch}")
    return 0 if agreeing == args.batch else 1


if __name__ == "__main__":
    raise SystemExit(main())
