"""Answer a whole test split with the engine and with `generate`: `python -m benchmarks.easy_vqa CHECKPOINT`.

The engine answers all 9,673 questions of easy-VQA. `generate` answers an evenly spaced sample one question at a time,
encoding the image for each; its time is extrapolated to the whole split. Exits with status 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.agreement import requests_for
from llava.engine import Engine, Request, load_engine
from llava.eval.benchmarks.easy_vqa import EasyVQA
from llava.images import preprocess_image
from llava.mm_utils import tokenizer_image_token
from llava.utils import guarded


@torch.inference_mode()
def ask_alone(engine: Engine, request: Request) -> str:
    """Answer one question with greedy `generate`, preprocessing and encoding its image."""
    model, tokenizer = engine.model, engine.tokenizer
    assert isinstance(request.prompt, str)
    ids = tokenizer_image_token(request.prompt, tokenizer, return_tensors="pt").unsqueeze(0)
    pixels = preprocess_image(request.images[0], engine.image_processor, engine.image_aspect_ratio)
    out = model.generate(
        ids,
        images=pixels.unsqueeze(0).to(model.dtype),
        do_sample=False,
        use_cache=True,
        max_new_tokens=request.params.max_new_tokens,
        eos_token_id=sorted(engine.special.end_ids(request.params.stop)),
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.easy_vqa", description=__doc__)
    parser.add_argument("checkpoint", help="directory of a chat checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--questions", type=int, help="how many the engine answers (default: all)")
    parser.add_argument("--alone", type=int, default=200, help="how many are asked one at a time")
    parser.add_argument("--data-root", type=Path, help="easy-VQA's data folder (default: the installed package's)")
    args = parser.parse_args(argv)
    task = EasyVQA(args.data_root, "test")
    engine = load_engine(args.checkpoint, dtype=args.dtype, max_batch_size=args.batch_size)
    requests = requests_for(engine, args.checkpoint, task, args.questions)
    some = list(range(0, len(requests), max(1, len(requests) // args.alone)))[: args.alone]
    ask_alone(engine, requests[0])
    start = time.perf_counter()
    alone = [ask_alone(engine, requests[index]) for index in some]
    between = time.perf_counter()
    together = [done.text for done in engine.generate(requests)]
    end = time.perf_counter()
    same = sum(together[index] == answer for index, answer in zip(some, alone, strict=True))
    each = (between - start) / len(some)
    print(f"{len(requests)} questions: the engine takes {end - between:.0f} s")
    print(
        f"one at a time: {each * len(requests):.0f} s, from {len(some)} of them; {same} of {len(some)} answers the same"
    )
    print(f"ratio: {each * len(requests) / (end - between):.1f}")
    return int(same < len(some))


if __name__ == "__main__":
    sys.exit(main())
