"""HTTP with 16 clients: our controller and worker against the OpenAI-compatible server of vLLM.

Clients stream chat completions with one image and a fixed answer length: an image each; one image for all; and chats
of two turns, where a client sends its second question when it has the first answer. Each turn of the comparison has new
images. Time to first token is the median over the clients. In float32, answers must agree as in `generate`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import httpx

from benchmarks.peers import process
from benchmarks.peers.generate import SAME
from benchmarks.peers.models import make_model
from benchmarks.peers.process import PeerError, Server
from benchmarks.serve_client import photo, question

CLIENTS: Final = 16
LOADS: Final = {"distinct images": (1, True), "one image": (1, False), "two turns": (2, True)}  # turns, image each
# Ours / vLLM: of requests per second, and of the second turn's time to first token.
TARGETS: Final = {"distinct images": 1.3, "one image": 1.5, "two turns": 0.0}
FIRST: Final = 1.0
Json = dict[str, Any]


class Plan(NamedTuple):
    """Sizes of the load."""

    pixels: int = 336
    clients: int = CLIENTS
    tokens: int = 64  # per answer
    short: int = 32  # per answer of a chat


class Reply(NamedTuple):
    """Seconds to the first text and to the end, and the whole text."""

    first: float
    end: float
    text: str


class Turn(NamedTuple):
    """All clients of one side at once: seconds until all have their answers, and the last answer of each."""

    seconds: float
    replies: list[Reply]


def our_commands(chat: Path, dtype: str) -> list[list[str]]:
    module = [sys.executable, "-m"]
    worker = ["--model-path", str(chat), "--device", "cpu", "--dtype", dtype, "--port", "0", "--controller", "{url}"]
    return [
        [*module, "llava.serve.controller", "--host", "127.0.0.1", "--port", "{port}"],
        [*module, "llava.serve.model_worker", *worker, "--limit-model-concurrency", str(CLIENTS)],
    ]


def peer_command(python: str, exported: Path, dtype: str) -> list[str]:
    words = ["--host", "127.0.0.1", "--port", "{port}", "--model", str(exported), "--dtype", dtype]
    limits = ["--max-model-len", "2048", "--max-num-seqs", str(CLIENTS), "--limit-mm-per-prompt", '{"image": 1}']
    eager = ["--enforce-eager"] if dtype == "float32" else []
    return [python, "-m", "vllm.entrypoints.openai.api_server", *words, *limits, *eager]


def user(number: int, image: str | None = None) -> Json:
    text = {"type": "text", "text": question(number)}
    shown = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}] if image else []
    return {"role": "user", "content": [*shown, text]}


async def ask(http: httpx.AsyncClient, server: Server, messages: Sequence[Json], tokens: int) -> Reply:
    content = {"model": server.model, "messages": messages, "max_tokens": tokens, "temperature": 0.0,
               "stream": True, **server.extra}  # fmt: skip
    sent, first, text = time.perf_counter(), 0.0, ""
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=content) as reply:
        if reply.status_code != 200:
            raise PeerError(f"{server.url} replied {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "choices" not in event:
                raise PeerError(f"{server.url} failed in a stream: {line[:300]}")
            new = event["choices"][0]["delta"].get("content") if event["choices"] else None
            first = first or (time.perf_counter() - sent if new else 0.0)
            text += new or ""
    return Reply(first, time.perf_counter() - sent, text)


async def converse(http: httpx.AsyncClient, server: Server, plan: Plan, number: int, image: str, turns: int) -> Reply:
    """The last reply of a chat of some turns about one image."""
    messages: list[Json] = []
    for turn in range(turns):
        messages.append(user(number + 500 * turn, None if turn else image))
        reply = await ask(http, server, messages, plan.tokens if turns == 1 else plan.short)
        messages.append({"role": "assistant", "content": reply.text.strip()})
    return reply


async def measure(server: Server, plan: Plan, name: str, turn: int) -> Turn:
    turns, distinct = LOADS[name]
    first = 1000 * (len(LOADS) * turn + list(LOADS).index(name))  # no image and no question occurs twice
    numbers = range(first, first + plan.clients)
    shown = numbers if distinct else [first] * plan.clients
    images = [photo(number, (plan.pixels, plan.pixels)) for number in shown]
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, timeout=process.SECONDS, limits=limits) as http:
        start = time.perf_counter()
        chats = (converse(http, server, plan, *given, turns) for given in zip(numbers, images))
        replies = await asyncio.gather(*chats)
        return Turn(time.perf_counter() - start, replies)


def compare(servers: Sequence[Server], plan: Plan, name: str, pairs: int) -> list[list[Turn]]:
    """Turns of ours and of the peer; the first pair is a warm-up."""
    turns: list[list[Turn]] = [[], []]
    for turn in range(pairs + 1):
        for server, done in zip(servers, turns):
            try:
                time.sleep(process.PAUSE)
                done.append(asyncio.run(measure(server, plan, name, turn)))
            except httpx.HTTPError as error:
                server.check(2.0)  # a connection is lost before the process has ended
                raise PeerError(f"{server.url}: {error!r}") from error
    return turns


def report(name: str, dtype: str, turns: Sequence[Sequence[Turn]]) -> tuple[bool, bool]:
    """Print the lines of a load; whether targets are reached, and whether answers agree where they must."""
    ours, peer = (side[1:] for side in turns)
    pairs = [pair for one, other in zip(ours, peer) for pair in zip(one.replies, other.replies)]
    equal = sum(one.text.strip() == other.text.strip() for one, other in pairs)
    count = len(ours[0].replies) * (2 if name == "two turns" else 1)
    rates = [[count / turn.seconds for turn in side] for side in (ours, peer)]
    firsts = [[median(reply.first for reply in turn.replies) for turn in side] for side in (ours, peer)]
    second = name == "two turns"
    least, most = f">= {TARGETS[name]}" if TARGETS[name] else "", f"<= {FIRST}" if second else ""
    first = "second turn's first token" if second else "first token"
    lines = [("requests", "/s", rates, least), (first, "s", firsts, most)]
    found = []
    for what, unit, (mine, theirs), target in lines:
        ratios = [one / other for one, other in zip(mine, theirs)]
        found.append(median(ratios))
        print(f"| {name}, {what} | {median(theirs):.3g} {unit} | {median(mine):.3g} {unit} "
              f"| {found[-1]:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {target} | {equal} of {len(pairs)} |",
              flush=True)  # fmt: skip
    reached = found[0] >= TARGETS[name] and (found[1] <= FIRST or not second)
    complete = all(one.text.strip() and other.text.strip() for one, other in pairs)
    return reached, complete and (equal >= SAME * len(pairs) or dtype != "float32")


def run(args: argparse.Namespace) -> int:
    python = process.interpreter(args.environments / "vllm", "vllm", args.install)
    plan = Plan(pixels=56, clients=2, tokens=3, short=2) if args.quick else Plan()
    reached: list[bool] = []
    with tempfile.TemporaryDirectory() as directory:
        chat, exported = make_model(Path(directory), args.quick, answers=True)
        for dtype in args.dtypes:
            # As in our prompts, a BOS token precedes the text.
            peer = Server([peer_command(python, exported, dtype)], {"add_special_tokens": True})
            with closing(peer), closing(Server(our_commands(chat, dtype))) as ours:
                print(f"\nvLLM, {dtype}, {plan.clients} clients, {plan.tokens} new tokens (two turns: {plan.short}); "
                      f"median of {args.pairs} pairs (range)\n")  # fmt: skip
                print("| clients | peer | ours | ours / peer | target | equal answers |\n|---|---|---|---|---|---|")
                for name in LOADS:
                    fast, agree = report(name, dtype, compare((ours, peer), plan, name, args.pairs))
                    reached.append(agree and (fast or args.quick))
    return 0 if all(reached) else 1
