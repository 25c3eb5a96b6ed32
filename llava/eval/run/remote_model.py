"""Client of servers with an OpenAI-compatible API (vLLM, SGLang, LMDeploy, `llava serve`), and answers from them.

The server applies its own conversation template. Images are sent as data URLs: opaque JPEG, PNG and WebP files
unchanged, others as PNG with the pixels of `open_image`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar

import requests

from llava.errors import ConfigError, LlavaError, RequestError
from llava.eval.run.questions import Question

if TYPE_CHECKING:
    from llava.eval.run.runner import Answer, RunSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRIED_STATUSES: Final = (408, 409, 429)  # client errors that may pass; all statuses from 500 on are retried as well
MAX_FAILURES: Final = 8  # consecutive unanswered questions that end a run: server down, or wrong model name


def normalize_url(url: str) -> str:
    """The base URL of an API without a trailing slash. Raises `ConfigError` if the scheme is missing."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"The address {url!r} must start with http:// or https://, as in http://HOST:PORT/v1.")
    return url.rstrip("/")


def auth_headers() -> dict[str, str]:
    """Request headers with the key of `OPENAI_API_KEY`, if it is set."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def chat_completion(
    url: str,
    body: Mapping[str, object],
    *,
    tries: int = 6,
    timeout: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """POST `body` to `url/chat/completions` and return the text of the reply.

    Timeouts, statuses from 500 on and `RETRIED_STATUSES` are retried after 1, 2, 4 … seconds. Raises `RequestError`
    after `tries` attempts, and immediately for any other status.
    """
    reason = ""
    for attempt in range(tries):
        if attempt:
            logger.warning("%s failed (%s); retrying.", url, reason)
            sleep(min(2.0 ** (attempt - 1), 60.0))
        try:
            request = {**body, "stream": False}  # some servers stream by default
            reply = requests.post(f"{url}/chat/completions", json=request, headers=auth_headers(), timeout=timeout)
            if reply.ok:
                return _text(reply)
            reason = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if reply.status_code < 500 and reply.status_code not in RETRIED_STATUSES:
                break
        except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
    raise RequestError(f"The model {body['model']} at {url} gave no reply ({reason}).")


def _text(reply: requests.Response) -> str:
    """The text of a reply, also from servers that send a stream of events although none was requested."""
    if not reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        return str(reply.json()["choices"][0]["message"]["content"] or "")
    lines = (line.removeprefix("data:").strip() for line in reply.content.decode("utf-8").split("\n"))
    events = [json.loads(line) for line in lines if line and line != "[DONE]" and line[0] == "{"]
    if not events or any("error" in event for event in events):
        raise ValueError(f"a stream without an answer: {reply.content[-200:]!r}")
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def served_model(url: str, timeout: float = 30.0) -> str:
    """The name of the only model of a server. Raises `RequestError` if it lists several or none."""
    try:
        reply = requests.get(f"{url}/models", headers=auth_headers(), timeout=timeout)
        reply.raise_for_status()
        names = [str(model["id"]) for model in reply.json()["data"]]
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"The server at {url} does not list its models ({error}); check --api-base.") from error
    if len(names) != 1:
        listed = ", ".join(names) or "(none)"
        raise RequestError(f"The server at {url} has the models {listed}; choose one with --api-model.")
    return names[0]


def data_url(content: bytes) -> str:
    """The data URL of an image file, see `llava.images.image_data_url`. Raises `ImageError` for other files."""
    from llava.images import image_data_url

    return image_data_url(content)


def map_unordered(function: Callable[[int], T], items: Iterable[int], threads: int) -> Iterator[T]:
    """Yield `function(item)` for each item as it finishes, computed by daemon threads.

    Unlike a `ThreadPoolExecutor`, an interrupted or finished program does not wait for calls in progress.
    """
    inputs: SimpleQueue[int | None] = SimpleQueue()
    outputs: SimpleQueue[T | BaseException] = SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        while (item := inputs.get()) is not None and not closed.is_set():
            try:
                outputs.put(function(item))
            except BaseException as error:  # raised again in the consumer
                outputs.put(error)

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    remaining, running = iter(items), 0
    try:
        while True:
            while running < 2 * threads and (item := next(remaining, None)) is not None:
                inputs.put(item)
                running += 1
            if not running:
                return
            output = outputs.get()
            running -= 1
            if isinstance(output, BaseException):
                raise output
            yield output
    finally:
        closed.set()
        for _ in range(threads):
            inputs.put(None)


class RemoteModel:
    """`EvalModel` over a server, with `batch_size` concurrent requests."""

    def __init__(self, url: str, model: str, *, batch_size: int = 16, timeout: float = 600.0, tries: int = 6) -> None:
        self.url, self.model = normalize_url(url), model
        self.batch_size, self.timeout, self.tries = batch_size, timeout, tries

    def identity(self, settings: RunSettings) -> dict[str, object]:
        """The model's name; the server's address may change between runs."""
        if settings.params.num_beams > 1:
            raise ConfigError("--api-base does not support beam search; remove --num_beams.")
        if settings.follow_up is not None:
            raise ConfigError("--api-base does not support --answer-prompter; remove it.")
        return {"checkpoint": f"api:{self.model}", "template": "the server's"}

    def answer(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Answer]:
        """Yield answers as replies arrive. Raises `RequestError` after `MAX_FAILURES` consecutive failures."""
        url_of = lru_cache(maxsize=64)(lambda name: data_url(settings.source.read(name)))

        def answer_one(position: int) -> Answer:
            try:
                body = self.body(questions[position], url_of, settings)
                text = chat_completion(self.url, body, tries=self.tries, timeout=self.timeout)
            except LlavaError as error:
                return position, "", str(error)
            return position, text.strip(), None

        failures = 0
        for position, text, error in map_unordered(answer_one, order, self.batch_size):
            failures = 0 if error is None else failures + 1
            if failures == MAX_FAILURES:
                raise RequestError(f"{MAX_FAILURES} consecutive questions got no answer, the last: {error}")
            yield position, text, error

    def body(self, question: Question, url_of: Callable[[str], str], settings: RunSettings) -> dict[str, object]:
        """The request of one question: its images, then its text; a plain string if there are no images."""
        params, text = settings.params, question.text or question.prompt
        images = [{"type": "image_url", "image_url": {"url": url_of(name)}} for name in question.images]
        content = [*images, {"type": "text", "text": text}] if images else text
        seed = settings.seed_for(question)
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            **({} if seed is None else {"seed": seed % 2**31}),
            **({"stop": list(params.stop)} if params.stop else {}),
        }
