"""Asking a model in this process: the engine's batch is kept full, every question ends on its own."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava.conversation import get_template, stop_strings
from llava.engine import Engine, Handle, Request
from llava.engine.pictures import Picture, identify
from llava.engine.prompt import render_question
from llava.errors import LlavaError
from llava.eval.manifest import checkpoint_fingerprint
from llava.eval.pictures import Loaded, prefetch
from llava.eval.questions import Question
from llava.eval.settings import Asked, RunSettings

FOLLOW_UP_TOKENS = 64


@dataclass(frozen=True)
class _Pending:
    """A question under way; `first` is its first answer when it is asked for the second time."""

    position: int
    request: Request
    first: str | None = None

    def again(self, first: str, follow_up: str) -> _Pending:
        """The same question with its answer and the words that ask for the letter."""
        params = dataclasses.replace(self.request.params, max_new_tokens=FOLLOW_UP_TOKENS)
        request = dataclasses.replace(self.request, prompt=f"{self.request.prompt}{first}{follow_up}", params=params)
        return _Pending(self.position, request, first)

    def whole(self, text: str) -> str:
        """What is recorded."""
        return text if self.first is None else f"{self.first}\n The answer is {text}"


class LocalModel:
    """An engine as the runner sees it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batch_size = engine.max_batch_size

    def identity(self, settings: RunSettings) -> dict[str, Any]:
        """What decides the answers beside questions and decoding."""
        engine, config = self.engine, self.engine.model.config
        example = render_question(get_template(settings.template), "{question}", 1, config)
        return {
            "checkpoint": checkpoint_fingerprint(settings.model_path),
            "template": {"name": settings.template, "text": example},
            "image_aspect_ratio": engine.image_aspect_ratio,
            "dtype": str(engine.lm.spec.dtype).removeprefix("torch."),
            "quantization": settings.quantization,
            **({} if settings.follow_up is None else {"follow_up": settings.follow_up}),
            "attention": getattr(config, "_attn_implementation", None),
            "device": engine.lm.spec.device.type,
        }

    def ask(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Asked]:
        """Yield (position, answer, error or None) as questions finish."""
        engine, template = self.engine, get_template(settings.template)
        stop = (*settings.params.stop, *stop_strings(template))
        active: dict[Handle, _Pending] = {}
        pictures = prefetch(questions, order, settings.source, settings.num_workers)
        opened: Loaded = []
        named: list[Picture] = []
        more = True
        while more or active:
            while more and len(active) < 2 * engine.max_batch_size:
                item = next(pictures, None)
                if item is None:
                    more = False
                    break
                position, images = item
                try:
                    if isinstance(images, LlavaError):
                        raise images
                    if images is not opened:  # neighbours with equal pictures share them
                        opened, named = images, [identify(image) for image in images]
                    question = questions[position]
                    text = question.text or question.prompt
                    prompt = render_question(template, text, len(named), engine.model.config)
                    params = dataclasses.replace(settings.params, stop=stop, seed=question_seed(settings, question))
                    request = Request(prompt, named, params)
                    active[engine.submit(request)] = _Pending(position, request)
                except LlavaError as error:
                    yield position, "", str(error)
            engine.step()
            for handle in [handle for handle in active if handle.done]:
                done, pending = handle.result(), active.pop(handle)
                if done.error:
                    yield pending.position, "", done.error
                elif settings.follow_up and pending.first is None:
                    again = pending.again(done.text, settings.follow_up)
                    try:
                        active[engine.submit(again.request)] = again
                    except LlavaError as error:
                        yield pending.position, "", str(error)
                else:
                    yield pending.position, pending.whole(done.text), None


def question_seed(settings: RunSettings, question: Question) -> int | None:
    """A seed of the question's own, so that a sampled answer depends neither on the batch nor on the shard."""
    if settings.params.temperature == 0 or settings.params.seed is None:
        return None
    rounds = () if question.round_id is None else (question.round_id,)
    key = "\n".join(map(str, (question.question_id, question.prompt, *rounds)))
    return settings.params.seed + zlib.crc32(key.encode())
