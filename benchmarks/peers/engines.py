"""Answers on request by our engine or a peer, each in its environment: `python -m benchmarks.peers.engines SETTINGS`.

Protocol: settings as JSON in the first argument; one JSON line on stdout when ready; then, for each line on stdin with
the path of a request file, one with the seconds and the tokens of all answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.measure import open_replies, settings

IMAGE = -200  # the placeholder of an image in token ids
BATCH = 16  # requests at a time


class Work(NamedTuple):
    """Token ids of all prompts with the image of each, if any; `cached` asks once before the measurement."""

    prompts: list[list[int]]
    images: list[Any]
    new_tokens: int
    cached: bool


def read_work(path: str) -> Work:
    """Read a request file; equal paths of images become one image."""
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    images = {name: Image.open(name).convert("RGB") for name in set(given["images"]) - {""}}
    return Work(given["prompts"], [images.get(name) for name in given["images"]], given["new_tokens"], given["cached"])


def serve_answers(answers: Any, replies: Any) -> None:
    """Answer a request file for each line on stdin, until it ends."""
    print(json.dumps({"version": answers.version, "threads": os.cpu_count()}), file=replies, flush=True)
    for line in sys.stdin:
        work = read_work(line.strip())
        if work.cached:
            answers(work._replace(new_tokens=1))
        start = time.perf_counter()
        tokens = answers(work)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=replies, flush=True)


def image_token(model: str) -> int | None:
    """Token id of an image in an export; None for a language model."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return config.get("image_token_index", config.get("image_token_id"))


class Llava:
    """Our engine, with its default batch size of 16."""

    version = "ours"

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        from llava.engine.arguments import EngineArgs

        self.engine = EngineArgs(model, device="cpu", dtype=dtype, max_batch_size=BATCH, **options).build_engine()
        self.engine.special.end = frozenset()

    def __call__(self, work: Work) -> list[list[int]]:
        from llava.engine import Request, SamplingParams

        params = SamplingParams(work.new_tokens)
        requests = [
            Request(ids, [image] if image else [], params, cache_prefix=work.cached)
            for ids, image in zip(work.prompts, work.images)
        ]
        return [list(done.token_ids) for done in self.engine.generate(requests)]


class Vllm:
    """vLLM with its defaults: prefix caching and, without `eager`, compilation."""

    def __init__(self, model: str, dtype: str, eager: bool) -> None:
        import vllm

        self.version = f"vLLM {vllm.__version__}"
        self.token = image_token(model)
        self.llm = vllm.LLM(
            model=model, dtype=dtype, enforce_eager=eager, max_model_len=2048, max_num_seqs=BATCH,
            limit_mm_per_prompt={"image": 1}, enable_prefix_caching=True,
        )  # fmt: skip

    def __call__(self, work: Work) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=work.new_tokens, ignore_eos=True)
        prompts = []
        for ids, image in zip(work.prompts, work.images):
            prompt = {"prompt_token_ids": [self.token if token == IMAGE else token for token in ids]}
            prompts.append({**prompt, "multi_modal_data": {"image": image}} if image else prompt)
        return [list(one.outputs[0].token_ids) for one in self.llm.generate(prompts, params, use_tqdm=False)]


class Transformers:
    """`LlavaForConditionalGeneration.generate` in batches of 16 rows padded on the left; it reuses no prefix."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        import transformers

        self.version = f"transformers {transformers.__version__}"
        self.torch, self.token = torch, image_token(model)
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model.eval().generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
        self.processor = transformers.AutoImageProcessor.from_pretrained(model)
        vision = self.model.config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2

    def __call__(self, work: Work) -> list[list[int]]:
        torch, rows = self.torch, []
        for start in range(0, len(work.prompts), BATCH):
            prompts, images = (part[start : start + BATCH] for part in (work.prompts, work.images))
            expanded = [[new for token in ids for new in self._expand(token)] for ids in prompts]
            longest = max(map(len, expanded))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in expanded])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in expanded])
            pixels = self.processor(images, return_tensors="pt").pixel_values.to(self.model.dtype)
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=work.new_tokens
                )
            rows += out[:, longest:].tolist()
        return rows

    def _expand(self, token: int) -> list[int | None]:
        return [self.token] * self.patches if token == IMAGE else [token]


class LlamaCpp:
    """llama.cpp through the low-level API of llama-cpp-python, one request at a time; it keeps the last prompt."""

    def __init__(self, model: str) -> None:
        import llama_cpp

        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
        self.api, self.prompt, threads = llama_cpp, [], os.cpu_count()
        self.llama = llama_cpp.Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def __call__(self, work: Work) -> list[list[int]]:
        return [self._answer(ids, work.new_tokens) for ids in work.prompts]

    def _answer(self, ids: list[int], count: int) -> list[int]:
        kept = self.llama.longest_token_prefix(self.prompt, ids[:-1])
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.llama.ctx), 0, kept, -1)
        self.prompt, given, found = ids, ids[kept:], []
        for _ in range(count):
            given = [self._next(given)]
            found += given
        return found

    def _next(self, ids: list[int]) -> int:
        import numpy as np

        array = (self.api.llama_token * len(ids))(*ids)  # the batch points to it
        assert self.api.llama_decode(self.llama.ctx, self.api.llama_batch_get_one(array, len(ids))) == 0
        logits = self.api.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)).argmax())


ENGINES = {"llava": Llava, "vllm": Vllm, "transformers": Transformers, "llama.cpp": LlamaCpp}


def main(engine: str, **options: Any) -> None:
    replies = open_replies()  # before libraries print
    serve_answers(ENGINES[engine](**options), replies)


if __name__ == "__main__":
    main(**settings())
