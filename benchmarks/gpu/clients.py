"""Clients of a model worker in a separate process: `python -m benchmarks.gpu.clients`, a JSON job on stdin.

The job is `{"host", "port", "path", "bodies"}`. All bodies are posted concurrently, each over its own connection. The
result is one JSON list on stdout with, per request, the seconds from the start of the job to its start, first text and
end, the number of tokens, and an error. It uses only the standard library, so it starts quickly.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a body with `transfer-encoding: chunked`."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def ask(job: dict[str, Any], body: dict[str, Any], start: float) -> dict[str, Any]:
    """One request; frames are JSON objects that end with NUL."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(job["host"], job["port"])
    sent = time.perf_counter() - start
    head = f"POST {job['path']} HTTP/1.1\r\nhost: {job['host']}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
    await writer.drain()
    reply = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, frame, rest = 0.0, dict[str, Any](), b""
    if "transfer-encoding: chunked" not in reply.lower():
        return {"error": reply.splitlines()[0] + (await reader.read()).decode(errors="replace")[:200]}
    async for chunk in _chunks(reader):
        *frames, rest = (rest + chunk).split(b"\0")
        for piece in filter(None, frames):
            frame = json.loads(piece)
            if frame.get("text") and not first:
                first = time.perf_counter() - start
    writer.close()
    end = time.perf_counter() - start
    error = "" if frame.get("finish_reason") in ("stop", "length") else f"it ended with {str(frame)[:200]}"
    tokens = (frame.get("usage") or {}).get("completion_tokens", 0)
    return {"sent": sent, "first": first, "end": end, "tokens": tokens, "error": error}


async def main() -> None:
    job = json.load(sys.stdin)
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(job, body, start) for body in job["bodies"]))
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
