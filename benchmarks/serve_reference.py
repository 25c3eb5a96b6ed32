"""A worker that serves like the reference: one thread per request, five at a time, without a prefix cache.

    python -m benchmarks.serve_reference CHAT

A baseline with the benefit of the doubt: it does not search for stop strings, has no timeouts, and sends no heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse
from transformers import TextIteratorStreamer

from benchmarks.reference_way import use_reference_tower
from llava.images import process_images
from llava.mm_utils import load_image_from_base64, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.serve.common.middleware import STREAM_PATH
from llava.serve.common.protocol import encode_frame
from llava.serve.common.server import bind_socket, serve

AT_ONCE = 5


class Reference:
    """The model, streaming answers as cumulative frames."""

    def __init__(self, chat: Path) -> None:
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(chat, device="cpu")
        use_reference_tower(self.model, self.model.config.mm_vision_tower, torch.float32)

    def frames(self, body: dict[str, Any]) -> Iterator[bytes]:
        """Frames of one answer; `generate` runs in another thread."""
        images = [load_image_from_base64(image) for image in body["images"]]
        ids = tokenizer_image_token(body["prompt"], self.tokenizer, return_tensors="pt").unsqueeze(0)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        values: dict[str, Any] = {"do_sample": False, "use_cache": True, "max_new_tokens": body["max_new_tokens"]}
        if images:
            values["images"] = process_images(images, self.processor, self.model.config)

        def generate() -> None:
            with torch.inference_mode():
                self.model.generate(ids, streamer=streamer, **values)

        thread = threading.Thread(target=generate)
        thread.start()
        text = body["prompt"]
        for piece in streamer:
            text += piece
            yield encode_frame({"text": text, "error_code": 0})
        thread.join()


def make_app(reference: Reference) -> FastAPI:
    app, semaphore = FastAPI(), asyncio.Semaphore(AT_ONCE)

    async def release() -> None:
        semaphore.release()

    @app.post(STREAM_PATH)
    async def generate(request: Request) -> StreamingResponse:
        body = await request.json()
        await semaphore.acquire()
        return StreamingResponse(reference.frames(body), background=BackgroundTask(release))

    return app


async def _stop() -> None:
    """Nothing to clean up."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)  # prints the address to stderr
    raise SystemExit(serve(make_app(Reference(Path(sys.argv[1]))), bind_socket("127.0.0.1", 0), _stop))
