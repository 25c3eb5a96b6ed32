"""Requests of a soak test: complete ones, cancelled ones, and malformed ones."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from llava.serve.common.protocol import FrameReader
from tests.tiny import CHAT

Kind = Literal["whole", "cancelled", "malformed"]
STREAM, API = "/worker_generate_stream", "/v1/chat/completions"
PATIENCE = 600.0  # timeout of a reply in seconds
QUESTIONS = ("What color is the shape?", "Is there a blue circle in the image?", "Describe the image concisely.",
             "What shape is present in the image?", "Why? Because it is so.")  # fmt: skip
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK")


@dataclass(frozen=True)
class Call:
    """One request as bytes. The client leaves after receiving `leave_after` bytes; below 0, before sending all."""

    kind: Kind
    path: str
    body: bytes
    leave_after: int | None = None
    content_type: str = "application/json"
    what: str = ""


@dataclass(frozen=True)
class Outcome:
    """Category of a reply, and what was wrong with it, if anything."""

    word: str
    fault: str = ""


def image(number: int) -> bytes:
    """One of a few images of various modes and shapes."""
    chance = np.random.default_rng(number)
    size = (int(chance.integers(1, 400)), int(chance.integers(1, 300)))
    mode = MODES[number % len(MODES)]
    small = Image.fromarray(chance.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize(size).convert(mode)
    file = io.BytesIO()
    small.save(file, "JPEG" if mode == "CMYK" else "PNG")
    return file.getvalue()


IMAGES = [base64.b64encode(image(number)).decode() for number in range(12)]


class Draw:
    """Random requests from a small set, so that the engine's caches stay bounded."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def call(self, kind: Kind, path: str) -> Call:
        if kind == "malformed":
            return self.malformed(path)
        body = self.body(path, long=kind == "cancelled" or self.chance.random() < 0.1)
        if kind == "whole":
            return Call(kind, path, body)
        leave = self.chance.choice((-self.chance.randrange(1, len(body)), 0, self.chance.randrange(1, 20_000)))
        return Call(kind, path, body, leave)

    def body(self, path: str, *, long: bool) -> bytes:
        chance = self.chance
        question, images = chance.choice(QUESTIONS), chance.sample(IMAGES, chance.choice((0, 1, 1, 2)))
        tokens = chance.choice((150, 300)) if long else chance.choice((1, 8, 30))
        values: dict[str, Any] = {"model": CHAT, "temperature": chance.choice((0.0, 1.0)), "seed": chance.randrange(2)}
        if path == STREAM:
            prompt = f"USER: {'<image>' * len(images)}\n{question} ASSISTANT:"
            values |= {"prompt": prompt, "images": images, "max_new_tokens": tokens, "stop": "</s>"}
            if chance.random() < 0.5:
                values["stream_mode"] = "delta"
        else:
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images
            ]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
            values |= {"messages": [message], "max_tokens": tokens, "stream": True}
        return json.dumps(values).encode()

    def malformed(self, path: str) -> Call:
        return self.wrong(path, *self.chance.choice(WRONG))

    def wrong(self, path: str, what: str, make: Callable[[dict[str, Any]], Any]) -> Call:
        """A valid request made invalid by `make`."""
        made = make(json.loads(self.body(path, long=False)))
        if isinstance(made, dict):
            for name in ("prompt", "images") if path == API else ("messages",):
                made.pop(name, None)  # of the other protocol
            made = json.dumps(made).encode()
        content_type = "text/plain" if what == "content type" else "application/json"
        return Call("malformed", path, made, None, content_type, what)


def _with(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change fields of either protocol; see `Draw.wrong`."""
    return lambda values: {**values, **changes}


def _shown(data: bytes | str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replace the images by this one."""
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    return _with(prompt="USER: <image> What? ASSISTANT:", images=[text], messages=[message])


def _said(text: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return _with(prompt=text, images=[], messages=[{"role": "user", "content": text}])


def _header_bomb() -> bytes:
    """A PNG that claims 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(data)


WRONG: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("cut JSON", lambda values: json.dumps(values).encode()[:-9]),
    ("list", lambda values: b"[]"),
    ("number", lambda values: b"42"),
    ("nothing", lambda values: b""),
    ("deep nesting", lambda values: b"[" * 10_000),
    ("NUL", lambda values: b"\0" * 64),
    ("content type", lambda values: json.dumps(values).encode()),
    ("no prompt", lambda values: {"model": CHAT}),
    ("temperature", _with(temperature=-1)),
    ("NaN", _with(temperature=float("nan"))),
    ("top_p", _with(top_p=2)),
    ("tokens", _with(max_new_tokens=0, max_tokens=0)),
    ("many tokens", _with(max_new_tokens=10**12, max_tokens=10**12)),
    ("words for tokens", _with(max_new_tokens="a", max_tokens="a")),
    ("stops", _with(stop=["x"] * 10_000)),
    ("seed", _with(seed=-1)),
    ("too long", _said("word " * 3000)),
    ("much too long", _said("z" * 3_000_000)),
    ("missing image", _with(prompt="<image>", images=[], messages=[{"role": "user", "content": [{"type": "x"}]}])),
    ("not base64", _shown("ä!")),
    ("empty image", _shown("")),
    ("no image", _shown(b"no image at all")),
    ("cut image", _shown(base64.b64decode(IMAGES[0])[:-40])),
    ("header bomb", _shown(_header_bomb())),
    ("image too large", _shown(b"\x89PNG\r\n\x1a\n" + b"\0" * (21 * 2**20))),
    ("SVG", _shown(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
]


async def send(url: str, call: Call) -> Outcome:
    """Send `call` on a new connection and judge the reply. Never raises because of the server."""
    address = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
    except OSError:
        return Outcome("unreachable")
    head = (f"POST {call.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: {call.content_type}\r\n"
            f"Content-Length: {len(call.body)}\r\nConnection: close\r\n\r\n")  # fmt: skip
    leave = call.leave_after
    try:
        part = call.body if leave is None or leave >= 0 else call.body[: len(call.body) + leave]
        writer.write(head.encode() + part)
        await asyncio.wait_for(writer.drain(), PATIENCE)
        if leave is not None and leave <= 0:
            return Outcome("left")
        data = await asyncio.wait_for(_read(reader, leave), PATIENCE)
        if leave is not None and len(data) >= leave:
            return Outcome("left")
    except asyncio.TimeoutError:
        return Outcome("stuck", f"no reply within {PATIENCE:.0f} s")
    except OSError:
        return Outcome("broken", "the connection broke")
    finally:
        writer.transport.abort()  # with a RST when something is unread, as a killed browser does
    return judge(call, data)


async def _read(reader: asyncio.StreamReader, limit: int | None) -> bytes:
    data = b""
    while limit is None or len(data) < limit:
        piece = await reader.read(65_536 if limit is None else limit - len(data))
        if not piece:
            break
        data += piece
    return data


def judge(call: Call, data: bytes) -> Outcome:
    """Judge a complete reply: an answer has exactly one final frame, a refusal has an error body."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return Outcome("broken", "the connection closed before the headers")
    status = int(head.split(b" ", 2)[1])
    chunked = b"transfer-encoding: chunked" in head.lower()
    content, complete = _chunks(body) if chunked else (body, True)
    if status == 200:
        finals, word = _finals(call.path, content)
        if not complete or finals == 0:
            return Outcome("broken", f"{finals} final frames in a stream that broke off")
        fault = "" if finals == 1 else f"{finals} final frames"
        if call.kind == "malformed" and word == "answered":
            fault = f"a malformed request ({call.what}) was answered"
        return Outcome(word, fault)
    fault = ""
    if status >= 500 and status not in (502, 503, 504):
        fault = f"status {status} for {call.what or 'a good request'}"
    if call.kind != "malformed" and status < 500 and status != 404:  # 404: no worker yet
        fault = f"a good request was refused with {status}: {content[:200]!r}"
    if b'"error"' not in content and b'"detail"' not in content:
        fault = fault or f"status {status} without an error body"
    return Outcome(f"refused {status}", fault)


def _chunks(body: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body, and whether it is complete."""
    content, at = b"", 0
    while True:
        line = body.find(b"\r\n", at)
        if line < 0:
            return content, False
        size = int(body[at:line], 16)
        if size == 0:
            return content, True
        content += body[line + 2 : line + 2 + size]
        at = line + 4 + size
        if at > len(body):
            return content, False


def _finals(path: str, content: bytes) -> tuple[int, str]:
    """Number of final frames (frames after a final one count too), and the category."""
    if path == STREAM:
        reader = FrameReader()
        frames = [*reader.feed(content), *reader.close()]
        last = [at for at, frame in enumerate(frames) if frame.get("finish_reason") or frame["error_code"]]
        word = "failed" if frames and frames[-1]["error_code"] else "answered"
        return len(frames) - last[0] if last else 0, word
    events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]" or events.count("[DONE]") != 1:
        return 0, "broken"
    parsed = [json.loads(event) for event in events[:-1]]
    finals = sum("error" in event or any(c["finish_reason"] for c in event.get("choices", ())) for event in parsed)
    return finals, "failed" if "error" in parsed[-1] else "answered"
