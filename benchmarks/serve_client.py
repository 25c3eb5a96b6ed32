"""HTTP clients of a worker that record time to first token, total time, and the answer or refusal."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from llava.conversation import conv_templates
from llava.serve.common.middleware import STREAM_PATH
from llava.serve.common.protocol import FrameReader
from tests.tiny import CORPUS

WORDS = CORPUS.replace("\n", " ").split()


@dataclass(frozen=True)
class Seen:
    """One request: seconds from sending to the first token and to the end; refused if `status` is not 200."""

    sent: float
    first: float
    end: float
    text: str
    tokens: int | None  # from the worker; the reference does not report it
    status: int = 200


def photo(number: int, size: tuple[int, int] = (640, 480)) -> str:
    """Image number `number` as a base64 JPEG."""
    chance = np.random.default_rng(number)
    small = Image.fromarray(chance.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return base64.b64encode(file.getvalue()).decode()


def question(seed: int, words: int = 5) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "?"


def prompt(*turns: str | None) -> str:
    """A prompt of alternating questions and answers with the image first and the last answer open."""
    conversation = conv_templates["v1"].copy()
    for number, text in enumerate(turns):
        conversation.append_message(conversation.roles[number % 2], f"<image>\n{text}" if number == 0 else text)
    return conversation.get_prompt()


def body(text: str, image: str, tokens: int) -> dict[str, Any]:
    return {"prompt": text, "images": [image], "temperature": 0.0, "max_new_tokens": tokens}


class Clients:
    """Clients of one worker; each request opens a new connection."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ask(self, content: dict[str, Any]) -> Seen:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=None, limits=limits) as http:
            sent = time.perf_counter()
            async with http.stream("POST", self.url + STREAM_PATH, json=content) as reply:
                reader, first, frame = FrameReader(), 0.0, dict[str, Any]()
                async for data in reply.aiter_raw():
                    for frame in reader.feed(data):
                        if not first and len(frame["text"]) > len(content["prompt"]):
                            first = time.perf_counter() - sent
                end = time.perf_counter() - sent
                text = frame["text"] if reply.status_code != 200 else frame["text"][len(content["prompt"]) :].strip()
                tokens = frame.get("usage", {}).get("completion_tokens")
                return Seen(sent, first, end, text, tokens, reply.status_code)

    async def together(self, contents: Sequence[dict[str, Any]]) -> list[Seen]:
        """Send all requests at once."""
        return await asyncio.gather(*map(self.ask, contents))

    async def arriving(self, contents: Sequence[dict[str, Any]], rate: float, seed: int = 0) -> list[Seen]:
        """Send requests as a Poisson process with `rate` per second, regardless of replies."""
        chance, start, due, tasks = random.Random(seed), time.perf_counter(), 0.0, []
        for content in contents:
            due += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self.ask(content)))
        return await asyncio.gather(*tasks)


def rate(seen: Sequence[Seen], tokens: int) -> float:
    """Tokens per second of requests sent together."""
    start, end = min(one.sent for one in seen), max(one.sent + one.end for one in seen)
    return len(seen) * tokens / (end - start)
