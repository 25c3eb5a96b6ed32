"""OpenAI-compatible API of the controller: models, chat, responses, text completions and tokenization.

    client = openai.OpenAI(base_url="http://localhost:10000/v1", api_key="…")

Supports streaming, text and several images (data URIs, and https URLs where allowed). Errors are OpenAI's error
objects, also within streams.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from llava.conversation import template_for
from llava.download import download
from llava.errors import ImageError
from llava.serve.common.middleware import release_body, request_id_of
from llava.serve.common.openai_chat import ApiBody, ChatBody, ChatMessage, RenderedChat, render_chat
from llava.serve.common.protocol import ErrorType, ServeError, WorkerStatus
from llava.serve.common.security import RateLimiter, bearer
from llava.serve.common.streaming import DeferredResponse, StreamResponse
from llava.serve.control.answers import Answer, ChatReply, Json, Reply, Shown, malformed_replies
from llava.serve.control.app import ControllerService
from llava.serve.control.completions import (
    CompletionBody,
    CompletionReply,
    DetokenizeRequest,
    TokenizeRequest,
    as_prompt,
    prompt_fields,
)
from llava.serve.control.responses import ResponseBody, ResponseReply

_IMAGE_BYTES: Final = 20 * 2**20
_CREATED: Final = 1_700_000_000  # constant, since models have no creation date
_PUBLISHED: Final = ("temperature", "top_p", "seed")  # fields that workers of every version accept
_TOKEN_FIELDS: Final = {"tokens", "add_special_tokens", "return_token_strs"}

MakeReply = Callable[[str, str, Sequence[Answer]], Reply]


class OpenAIServing:
    """Converts requests of the API to worker requests, and the workers' frames to OpenAI objects.

    `rate_limit` is in answers per minute and client; `allow_urls` permits fetching https images; a stream without a
    token for `keep_alive` seconds gets a comment, since some proxies and clients close idle connections.
    """

    def __init__(
        self,
        controller: ControllerService,
        rate_limit: float | None = None,
        *,
        allow_urls: bool = False,
        unsafe_local: bool = False,
        keep_alive: float = 5.0,
    ) -> None:
        self.controller = controller
        self.limiter = RateLimiter(rate_limit) if rate_limit else None
        self.allow_urls = allow_urls
        self.keep_alive = keep_alive
        self.unsafe_local = unsafe_local  # for tests, see `llava.download`
        self._fetching = asyncio.Semaphore(4)

    def models(self) -> list[dict[str, object]]:
        registry = self.controller.registry
        statuses = [(name, status) for name in registry.models() if (status := registry.status_of(name))]
        return [
            {
                "id": name,
                "object": "model",
                "created": _CREATED,
                "owned_by": "llava",
                "root": adapter.root if (adapter := status.adapter(name)) else name,
                "parent": status.base if adapter else None,
                "max_model_len": status.info and status.info.context_length,
            }
            for name, status in statuses
        ]

    def spend(self, request: Request, answers: int = 1) -> None:
        """Charge a request to its key, or without keys to its address; `ServeError` (429) above the rate limit."""
        if self.limiter is None:
            return
        client = request.client.host if request.client else ""
        header = request.headers.get("authorization", "").encode("latin-1")
        wait = self.limiter.spend(bearer(header) or client.encode(), answers)
        if wait:
            rate = f"{self.limiter.per_minute:g} answers per minute"
            message = f"Rate limit of {rate} exceeded; retry in {wait:.0f} seconds."
            raise ServeError(ErrorType.RATE_LIMITED, message, retry_after=wait)

    def _admit(self, model: str, request: Request, answers: int = 1) -> WorkerStatus:
        """The status of a worker of `model`, after the answers are counted by the rate limit."""
        release_body(request)
        self.spend(request, answers)
        status = self.controller.registry.status_of(model)
        if status is None:
            raise _unknown_model()
        return status

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Respond to `/v1/chat/completions`."""
        status = self._admit(body.model, request, body.n)
        prompt = await self._chat_prompt(body, body.messages, status)
        return await self._reply(body, request, status, [prompt], partial(ChatReply, shown=_shown(body)))

    async def respond(self, body: ResponseBody, request: Request) -> Response:
        """Respond to `/v1/responses`."""
        status = self._admit(body.model, request)
        prompt = await self._chat_prompt(body, body.messages, status)
        return await self._reply(body, request, status, [prompt], partial(ResponseReply, settings=body.settings))

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Respond to `/v1/completions`."""
        status = self._admit(body.model, request, len(body.prompts) * body.n)
        _require(status, "completions", "has no text completions; use /v1/chat/completions")
        echo = [await self._text_of(body.model, prompt, request) for prompt in body.prompts] if body.echo else []
        prompts = [prompt_fields(prompt) for prompt in body.prompts]
        make = partial(CompletionReply, echo=echo, shown=_shown(body))
        return await self._reply(body, request, status, prompts, make)

    async def _text_of(self, model: str, prompt: str | list[int], request: Request) -> str:
        if isinstance(prompt, str):
            return prompt
        reply = await self._ask("/worker_detokenize", {"model": model, "tokens": prompt}, request)
        return str(reply.get("prompt", ""))

    async def _ask(self, path: str, content: Json, request: Request) -> Json:
        """The JSON object of a worker's reply."""
        sent = _encoded(content)
        reply = await self.controller.call(path, str(content["model"]), sent, request_id_of(request))
        with malformed_replies():
            return dict(json.loads(bytes(reply.body)))

    async def tokenize(self, body: TokenizeRequest | DetokenizeRequest, request: Request) -> Response:
        """Respond to `/tokenize` and `/detokenize`. Without a model, the request is for the only one."""
        models = self.controller.registry.models()
        model = body.model or (models[0] if len(models) == 1 else "")
        status = self._admit(model, request)
        _require(status, "tokenize", "has no tokenizer")
        content: Json = {"model": model, **body.model_dump(include=_TOKEN_FIELDS)}
        if isinstance(body, DetokenizeRequest):
            return JSONResponse(await self._ask("/worker_detokenize", content, request))
        prompt = as_prompt(body.prompt or "")
        if body.messages is not None:
            prompt = self._render(body.messages, status, model).prompt
        content |= {"prompt": prompt, "text_spans": prompt.text_spans}
        return JSONResponse(await self._ask("/worker_tokenize", content, request))

    @staticmethod
    def _render(messages: Sequence[ChatMessage], status: WorkerStatus, model: str) -> RenderedChat:
        template = status.template_of(model) or template_for(None, model)
        return render_chat(messages, template)

    async def _chat_prompt(self, body: ApiBody, messages: Sequence[ChatMessage], status: WorkerStatus) -> Json:
        """The keys of a worker request that hold a rendered chat."""
        rendered = self._render(messages, status, body.model)
        return {
            "prompt": rendered.prompt,
            "text_spans": rendered.prompt.text_spans,
            "messages": [message.model_dump() for message in rendered.messages],
            "images": [await self._load_image(address) for address in rendered.images],
            "stop": rendered.stop,
        }

    async def _reply(
        self, body: ApiBody, request: Request, status: WorkerStatus, prompts: Sequence[Json], make: MakeReply
    ) -> Response:
        """Open a stream for each prompt, and return the response that reads them."""
        fields = body.worker_fields()
        extra = next((name for name in fields if name not in _PUBLISHED), None)
        if extra is not None:
            name = "logprobs" if extra == "top_logprobs" else extra
            _require(status, "sampling", f"does not support {name}; omit it", param=name)
        limit = status.info.max_new_tokens if status.info else 1024
        fields |= {"model": body.model, "stream_mode": "delta"}
        fields["max_new_tokens"] = min(body.max_new_tokens or limit, limit)
        request_id, answers = request_id_of(request), list[Answer]()
        closers: list[Callable[[], None]] = []

        def close() -> None:
            for each in closers:
                each()

        try:
            for prompt in prompts:
                stops = prompt.get("stop")
                content = {**fields, **prompt, "stop": [*(stops if isinstance(stops, list) else []), *body.stop]}
                upstream = await self.controller.open(body.model, _encoded(content), request_id)
                shown = str(prompt["prompt"]) if "messages" in prompt else ""
                answers.append(Answer(shown, upstream, body.n, len(answers) * body.n))
                closers.append(self.controller.close_callback(upstream, answers[-1].outcome))
        except BaseException:
            close()
            raise
        reply = make(body.model, request_id, answers)
        if body.stream:
            return StreamResponse(reply.events(self.keep_alive), close, media_type="text/event-stream")
        return DeferredResponse(reply.response(), close)

    async def _load_image(self, address: str) -> str:
        """Base64 of the image in a data URI or, where allowed, at an https address."""
        scheme, _, rest = address.partition(":")
        if scheme == "data":
            kind, comma, data = rest.partition(",")
            if not comma or not kind.startswith("image/") or not kind.endswith(";base64"):
                raise _bad_image("The data URI of an image must have the form data:image/png;base64,…")
            return data
        if scheme not in ("http", "https"):
            raise _bad_image("An image must be a data URI; paths and other addresses are not supported.")
        if not self.allow_urls:
            raise _bad_image("Image URLs are disabled; send the image as a data URI.")
        async with self._fetching:
            try:
                content = await asyncio.to_thread(download, address, _IMAGE_BYTES, unsafe_local=self.unsafe_local)
            except ImageError as error:
                raise _bad_image("Cannot fetch the image; only https addresses of public hosts are allowed.") from error
        return base64.b64encode(content).decode()


def _encoded(content: Json) -> bytes:
    """JSON in UTF-8: ASCII could exceed the size limit of a body that has passed it."""
    return json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")


def _bad_image(message: str) -> ServeError:
    return ServeError(ErrorType.BAD_IMAGE, message, param="messages")


def _unknown_model() -> ServeError:
    return ServeError(ErrorType.NOT_FOUND, "No worker serves this model; see /v1/models.", param="model")


def _shown(body: ChatBody | CompletionBody) -> Shown:
    return Shown(body.stream_options.include_usage, body.num_logprobs is not None)


def _require(status: WorkerStatus, feature: str, text: str, param: str | None = None) -> None:
    """Raise `ServeError` (400) unless the worker has a feature."""
    if feature not in status.features:
        raise ServeError(ErrorType.BAD_REQUEST, f"The worker of this model {text}.", param=param)


def add_api_routes(app: FastAPI, server: OpenAIServing) -> None:
    """Add the API to the controller application."""

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        for entry in server.models():
            if entry["id"] == name:
                return entry
        raise _unknown_model()

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await server.chat(body, request)

    @app.post("/v1/responses", response_class=Response)
    async def responses(body: ResponseBody, request: Request) -> Response:
        return await server.respond(body, request)

    @app.post("/v1/completions", response_class=Response)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/tokenize", response_class=Response)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        return await server.tokenize(body, request)

    @app.post("/detokenize", response_class=Response)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        return await server.tokenize(body, request)
