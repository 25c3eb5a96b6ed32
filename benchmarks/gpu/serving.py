"""Sixteen clients of a model worker over loopback, greedy and sampled: time to first token and tokens per second."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.floor import decode_cost, prefill_cost, tower_cost
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.inference import shape
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.models import full_model, make_engine
from benchmarks.gpu.runner import Skip

CLIENTS: Final = 16
WORDS: Final = ("what", "color", "shape", "red", "blue", "circle", "answer", "question", "image", "cat", "why")
SAMPLING: Final = {"greedy": {"temperature": 0.0}, "top_p": {"temperature": 0.7, "top_p": 0.9}}
ROOT: Final = Path(__file__).parents[2]


@contextmanager
def worker(engine: Any, limit: int) -> Iterator[int]:
    """Run the model worker's application with a ready engine on a loopback port; yields the port."""
    try:
        from llava.serve.common.middleware import Keys, Limits
        from llava.serve.common.security import ApiKeys
        from llava.serve.worker.app import Worker, make_worker_app
        from llava.serve.worker.local_backend import BackendSettings, LoadedModel, LocalBackend, model_info
        from llava.serve.worker.preprocess import ImagePreprocessor, tokenizer_for
        from tests.serve.stubs import Live, until
    except ImportError as error:
        raise Skip(f"serving needs a package that is not installed: {error}") from error
    from llava.images import preprocess_image

    settings = BackendSettings(limit=limit, queue_limit=limit)
    info = model_info(engine, "random", None, settings)
    pixels = ImagePreprocessor(lambda image: preprocess_image(image, engine.image_processor, engine.image_aspect_ratio))
    loaded = LoadedModel(engine, info, False, tokenizer_for(engine), pixels)
    served = Worker(LocalBackend(lambda progress: loaded, settings), "random")
    live = Live(lambda port: make_worker_app(served, Keys(ApiKeys([])), Limits())).start()
    try:
        until(lambda: served.backend.state == "ready")
        yield live.port
    finally:
        live.stop()


def bodies(count: int, tokens: int, seed: int, sampling: dict[str, float]) -> list[dict[str, Any]]:
    """Requests, each with a 640 x 480 JPEG and a short question."""
    import numpy as np
    from PIL import Image

    from llava.conversation import conv_templates

    found = []
    for number in range(count):
        noise = np.random.default_rng((seed, number)).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        conversation = conv_templates["v1"].copy()
        words = random.Random(f"{seed} {number}").choices(WORDS, k=12)
        conversation.append_message(conversation.roles[0], "<image>\n" + " ".join(words) + "?")
        conversation.append_message(conversation.roles[1], None)
        found.append(
            {
                "model": "random",
                "prompt": conversation.get_prompt(),
                "images": [base64.b64encode(file.getvalue()).decode()],
                "max_new_tokens": tokens,
                "stream_mode": "delta",
                **sampling,
            }
        )
    return found


def ask_all(port: int, requests: list[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """Run the clients in a separate process; return their results."""
    from llava.serve.common.middleware import STREAM_PATH

    job = {"host": "127.0.0.1", "port": port, "path": STREAM_PATH, "bodies": requests}
    command = [sys.executable, "-m", "benchmarks.gpu.clients"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-500:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    errors = [one["error"] for one in found if one["error"]]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(found)} requests failed; the first: {errors[0]}")
    return found


def serving(bench: Bench) -> None:
    model = full_model(bench)
    count, tokens = (3, 4) if bench.quick else (CLIENTS, 128)
    engine = make_engine(model, max_batch_size=count)
    with worker(engine, count) as port:
        ask_all(port, bodies(2, 4, 0, SAMPLING["greedy"]), 60)
        for seed, (name, sampling) in enumerate(SAMPLING.items(), 1):
            what = f"{count} clients of a worker, one image each, {tokens} new tokens, {name}"
            if not bench.in_time(what):
                continue
            seen = ask_all(port, bodies(count, tokens, seed, sampling), max(30.0, bench.left()))
            if any(one["tokens"] != tokens for one in seen):
                raise RuntimeError(f"answers have {sorted({one['tokens'] for one in seen})} tokens, not {tokens}")
            rate = count * tokens / (max(one["end"] for one in seen) - min(one["sent"] for one in seen))
            first = [one["first"] - one["sent"] for one in seen]
            bench.line(what, rate, "tokens/s", floor=count * tokens / _floor(bench, model, count, tokens))
            bench.line(f"{what}: first token, median", median(first), "s", note=f"at most {max(first):.3g} s")


def _floor(bench: Bench, model: Any, rows: int, new_tokens: int) -> float:
    """Lower bound in seconds of encoding, prefill and decode steps, with 110 text tokens per prompt."""
    size, itemsize = shape(model), bench.dtype.itemsize
    tokens = 110 + size.image_tokens
    phases = [tower_cost(size, rows, itemsize=itemsize), prefill_cost(size, tokens, rows, itemsize=itemsize)]
    phases += [decode_cost(size, rows, tokens + step, itemsize=itemsize) for step in range(1, new_tokens)]
    return sum(phase.seconds(ceilings(bench)) for phase in phases)
