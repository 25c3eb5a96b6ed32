"""Asking a model in this process: the engine's batch is kept full, every question ends on its own."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llava.conversation import get_template, stop_strings
from llava.engine import Engine, Request, RequestHandle
from llava.engine.chat import render_question
from llava.engine.sequence import HashedImage, hash_image
from llava.errors import LlavaError
from llava.eval.run.images import Loaded, prefetch
from llava.eval.run.manifest import checkpoint_fingerprint
from llava.eval.run.questions import Question
from llava.eval.run.settings import Asked, RunSettings
from llava.images import preprocess_image

FOLLOW_UP_TOKENS = 64


@dataclass(frozen=True)
class _Pending:
    """A question in flight. `first`: the first answer, if this is the follow-up.

    `request` is kept only if a follow-up comes: it holds the images, which are otherwise freed once the engine has the
    answer.
    """

    position: int
    request: Request | None = None
    first: str | None = None

    def again(self, first: str, follow_up: str) -> tuple[Request, _Pending]:
        """The same question with its answer and the words that ask for the letter."""
        assert self.request is not None
        prompt = f"{self.request.prompt}{first}{follow_up}"
        params = dataclasses.replace(self.request.params, max_new_tokens=FOLLOW_UP_TOKENS)
        request = dataclasses.replace(self.request, prompt=prompt, params=params, cache_prefix=False)
        return request, _Pending(self.position, first=first)

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
            "dtype": str(engine.model_runner.spec.dtype).removeprefix("torch."),
            "quantization": settings.quantization,
            **({} if settings.follow_up is None else {"follow_up": settings.follow_up}),
            "attention": getattr(config, "_attn_implementation", None),
            "device": engine.model_runner.spec.device.type,
        }

    def ask(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Asked]:
        """Yield (position, answer, error or None) as questions finish."""
        engine, follow_up = self.engine, settings.follow_up
        active: dict[RequestHandle, _Pending] = {}
        submitted = self._submit(questions, order, settings)
        more = True
        while more or active:
            while more and len(active) < 2 * engine.max_batch_size:
                item = next(submitted, None)
                if item is None:
                    more = False
                elif isinstance(item[1], LlavaError):
                    yield item[0].position, "", str(item[1])
                else:
                    active[item[1]] = item[0]
            engine.step()
            for handle in [handle for handle in active if handle.done]:
                done, pending = handle.result(), active.pop(handle)
                if done.error:
                    yield pending.position, "", done.error
                elif follow_up and pending.first is None:
                    request, again = pending.again(done.text, follow_up)
                    try:
                        active[engine.submit(request)] = again
                    except LlavaError as error:
                        yield pending.position, "", str(error)
                else:
                    yield pending.position, pending.whole(done.text), None

    def _submit(
        self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings
    ) -> Iterator[tuple[_Pending, RequestHandle | LlavaError]]:
        """Lazily submit one question per item; holds only the current images."""
        engine, template = self.engine, get_template(settings.template)
        stop = (*settings.params.stop, *stop_strings(template))
        asked_twice = settings.follow_up is not None
        preprocess = None
        if engine.image_processor is not None:
            preprocess = partial(
                preprocess_image, processor=engine.image_processor, aspect_ratio=engine.image_aspect_ratio
            )
        opened: Loaded = []
        named: list[HashedImage] = []
        for position, images in prefetch(questions, order, settings.source, settings.num_workers, preprocess):
            try:
                if isinstance(images, LlavaError):
                    raise images
                if images is not opened:  # neighbours with equal images share them
                    opened, named = images, [hash_image(image) for image in images]
                question = questions[position]
                text = question.text or question.prompt
                prompt = render_question(template, text, len(named), engine.model.config)
                params = dataclasses.replace(settings.params, stop=stop, seed=question_seed(settings, question))
                # Finished answers are kept only for follow-ups; otherwise they would evict shared prefixes.
                request = Request(prompt, named, params, cache_prefix=asked_twice)
                submitted: RequestHandle | LlavaError = engine.submit(request)
                yield _Pending(position, request if asked_twice else None), submitted
            except LlavaError as error:
                yield _Pending(position), error


def question_seed(settings: RunSettings, question: Question) -> int | None:
    """A seed of the question's own, so that a sampled answer depends neither on the batch nor on the shard."""
    if settings.params.temperature == 0 or settings.params.seed is None:
        return None
    rounds = () if question.round_id is None else (question.round_id,)
    key = "\n".join(map(str, (question.question_id, question.prompt, *rounds)))
    return settings.params.seed + zlib.crc32(key.encode())
