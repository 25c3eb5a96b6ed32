"""Client of servers with an OpenAI-compatible API (vLLM, SGLang, LMDeploy, `llava serve`), and answers from them.

The server applies its own conversation template. Images are sent as data URLs: opaque JPEG, PNG and WebP files
unchanged, others as PNG with the pixels of `open_image`.
"""

from __future__ import annotations

import hashlib
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
from llava.eval.run.answers import input_facts
from llava.eval.run.questions import Question
from llava.openai_protocol import ApiError, Dialect, Reply, read_error, read_reply

if TYPE_CHECKING:
    from llava.eval.run.runner import Answer, RunSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DIALECTS: Final[dict[tuple[str, str], Dialect]] = {}  # by address and model

MAX_WAIT: Final = 600.0  # seconds before another attempt, whatever a server demands
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


def complete(
    url: str,
    body: Mapping[str, object],
    *,
    tries: int = 6,
    timeout: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Reply:
    """POST `body` to `url/chat/completions` and return the answer, with thinking set apart.

    Timeouts, statuses from 500 on and `RETRIED_STATUSES` are retried after 1, 2, 4 … seconds, or after those of
    `Retry-After`. Raises `RequestError` after `tries` attempts, and immediately for other statuses and empty answers.
    """
    request = {**body, "stream": False}  # some servers stream by default
    dialect = _DIALECTS.setdefault((url, str(body["model"])), Dialect())
    attempt = 0
    while True:
        sent, wait = dialect.translate(request), None
        try:
            reply = requests.post(f"{url}/chat/completions", json=sent, headers=auth_headers(), timeout=timeout)
            if not reply.ok:
                raise read_error(reply.content, reply.status_code, reply.headers)
            answer = read_reply(reply.content).split_thinking()
            if answer.missing is None:
                return answer
            reason, is_transient = answer.missing, False
        except ApiError as error:
            dialect.learn(error, sent)
            if dialect.translate(request) != sent:
                continue
            reason = f"HTTP {error.status}: {error.message}" if error.status else error.message
            is_transient, wait = error.is_transient, error.retry_after
        except requests.RequestException as error:
            reason, is_transient = f"{type(error).__name__}: {error}", True
        attempt += 1
        if attempt >= tries or not is_transient:
            raise RequestError(f"The model {body['model']} at {url} gave no reply ({reason}).")
        logger.warning("%s failed (%s); retrying.", url, reason)
        sleep(min(2.0 ** (attempt - 1) if wait is None else wait, MAX_WAIT))


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
        from llava.images import image_data_url

        url_of = lru_cache(maxsize=64)(lambda name: image_data_url(settings.source.read(name)))
        digest_of = lru_cache(maxsize=4096)(lambda name: hashlib.blake2b(url_of(name).encode(), digest_size=8).digest())

        def answer_one(position: int) -> Answer:
            question = questions[position]
            try:
                body = self.body(question, url_of, settings)
                digests = [digest_of(name) for name in question.images]
                reply = complete(self.url, body, tries=self.tries, timeout=self.timeout)
            except LlavaError as error:
                return position, "", str(error)
            facts = input_facts(question.text or question.prompt, digests, is_first=settings.is_first(position))
            if reply.thinking:
                facts["thinking"] = reply.thinking
            return position, reply.text.strip(), None, {**facts, **reply.usage, "finish_reason": reply.finish_reason}

        failures = 0
        for answer in map_unordered(answer_one, order, self.batch_size):
            failures = 0 if answer[2] is None else failures + 1
            if failures == MAX_FAILURES:
                raise RequestError(f"{MAX_FAILURES} consecutive questions got no answer, the last: {answer[2]}")
            yield answer

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
