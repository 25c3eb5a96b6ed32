"""Asking a server with OpenAI's API instead of a model in this process: a vLLM, SGLang or lmdeploy cluster, or ours.

The server applies its own conversation template; pictures travel as they are, in data URLs.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from PIL import Image, UnidentifiedImageError

from llava.errors import ConfigError, LlavaError, RequestError
from llava.eval.run.endpoint import address, chat
from llava.eval.run.local_model import question_seed
from llava.eval.run.questions import Question
from llava.eval.run.settings import Asked, RunSettings
from llava.images import open_image

T = TypeVar("T")

GIVE_UP: Final = 8  # questions in a row without an answer: the server is down, or the model's name is wrong
ACCEPTED: Final = ("image/png", "image/jpeg", "image/gif", "image/webp")  # by every server that takes pictures


def data_url(content: bytes) -> str:
    """A picture for a message; kinds that servers may not know become PNG. `ImageError` for what is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.get_format_mimetype()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        kind = None
    if kind not in ACCEPTED:
        buffer = io.BytesIO()
        open_image(content).save(buffer, "PNG")
        kind, content = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def in_threads(work: Callable[[int], T], items: Iterable[int], count: int) -> Iterator[T]:
    """What `work` makes of each item, as it comes; `count` are under way at a time.

    Unlike those of a pool, the threads are not waited for when the program ends or the user interrupts it.
    """
    asked: SimpleQueue[int | None] = SimpleQueue()
    answered: SimpleQueue[T | BaseException] = SimpleQueue()
    over = threading.Event()

    def run() -> None:
        while (item := asked.get()) is not None and not over.is_set():
            try:
                answered.put(work(item))
            except BaseException as error:  # raised where the answers are waited for
                answered.put(error)

    for _ in range(count):
        threading.Thread(target=run, daemon=True).start()
    waiting, under_way = iter(items), 0
    try:
        while True:
            while under_way < 2 * count and (item := next(waiting, None)) is not None:
                asked.put(item)
                under_way += 1
            if not under_way:
                return
            answer = answered.get()
            under_way -= 1
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        over.set()
        for _ in range(count):
            asked.put(None)


class RemoteModel:
    """A server as the runner sees it; `batch_size` requests are under way at a time."""

    def __init__(self, url: str, model: str, *, batch_size: int = 16, timeout: float = 600.0, tries: int = 6) -> None:
        self.url, self.model = address(url), model
        self.batch_size, self.timeout, self.tries = batch_size, timeout, tries

    def identity(self, settings: RunSettings) -> dict[str, Any]:
        """The model's name; its address may change between runs."""
        if settings.params.num_beams > 1:
            raise ConfigError("A server cannot be asked for beam search; leave out --num_beams.")
        if settings.follow_up is not None:
            raise ConfigError("A server cannot continue an answer of its own; leave out --answer-prompter.")
        return {"checkpoint": f"api:{self.model}", "template": "the server's"}

    def ask(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Asked]:
        """Yield (position, answer, error or None) as replies come; `RequestError` when nothing is answered any more."""
        url_of = lru_cache(maxsize=64)(lambda name: data_url(settings.source.read(name)))

        def one(position: int) -> Asked:
            try:
                return position, chat(
                    self.url, self.body(questions[position], url_of, settings), tries=self.tries, timeout=self.timeout
                ).strip(), None  # fmt: skip
            except LlavaError as error:
                return position, "", str(error)

        refused = 0
        for position, text, error in in_threads(one, order, self.batch_size):
            refused = 0 if error is None else refused + 1
            if refused == GIVE_UP:
                raise RequestError(f"{GIVE_UP} questions in a row got no answer, the last: {error}")
            yield position, text, error

    def body(self, question: Question, url_of: Any, settings: RunSettings) -> dict[str, Any]:
        """The request of one question: its pictures, then its text; a plain text without pictures."""
        params, text = settings.params, question.text or question.prompt
        pictures = [{"type": "image_url", "image_url": {"url": url_of(name)}} for name in question.images]
        content = [*pictures, {"type": "text", "text": text}] if pictures else text
        seed = question_seed(settings, question)
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            **({} if seed is None else {"seed": seed % 2**31}),
            **({"stop": list(params.stop)} if params.stop else {}),
        }
