"""Streaming HTTP responses that detect disconnects and always run their cleanup."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_CLIENT_LEFT: Final = 499


async def with_keep_alive(items: AsyncGenerator[T, None], seconds: float, filler: T) -> AsyncGenerator[T, None]:
    """`items`, and a `filler` after every `seconds` without one."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield filler
                continue
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            finally:
                waiting = None
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await items.aclose()


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all `sources` as they arrive. An exception in one of them ends the others."""
    waiting = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                try:
                    item = future.result()
                except StopAsyncIteration:
                    del waiting[future]
                    continue
                source = waiting.pop(future)
                waiting[asyncio.ensure_future(anext(source))] = source
                yield item
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


class StreamResponse(Response):
    """Streaming response of `chunks`; `on_close` is called exactly once, however the response ends.

    Starlette's streaming response runs its background task only after a complete stream, and a generator that was never
    started runs no `finally`; both would leak the resources of the request.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        on_close: Callable[[], None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.chunks = chunks
        self.on_close = on_close
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(self._send(send), receive, self.on_close)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.chunks):
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class DeferredResponse(Response):
    """Response computed by `work` after the route has returned, so that nothing of the route is kept meanwhile.

    `on_close` is called exactly once; a disconnect cancels `work`.
    """

    def __init__(self, work: Coroutine[object, object, Response], on_close: Callable[[], None]) -> None:
        super().__init__()
        self.work = work
        self.on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await _unless_disconnected(self.work, receive, self.on_close)
        await (response or Response(status_code=_CLIENT_LEFT))(scope, receive, send)


async def _unless_disconnected(
    work: Coroutine[object, object, T], receive: Receive, on_close: Callable[[], None]
) -> T | None:
    """The result of `work`; None when the client disconnected first, which cancels `work`. Calls `on_close` once."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        on_close()
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
