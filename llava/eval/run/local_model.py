"""Answers from an engine in this process; its batch stays full while questions finish at different times."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from llava.conversation import Piece, RenderedPrompt, get_template, stop_strings
from llava.engine import Engine, Request, RequestHandle
from llava.engine.chat import render_question
from llava.engine.sequence import Completion, HashedImage, hash_image
from llava.errors import LlavaError
from llava.eval.run.answers import input_facts
from llava.eval.run.files import Row
from llava.eval.run.images import prefetch
from llava.eval.run.questions import Question
from llava.images import preprocess_image
from llava.provenance import checkpoint_fingerprint

if TYPE_CHECKING:
    from llava.eval.run.images import Loaded, Preprocess
    from llava.eval.run.runner import Answer, RunSettings

FOLLOW_UP_TOKENS = 64


@dataclass(frozen=True)
class _Pending:
    """A running question with the facts to record about it. `first` is the first answer if this is the follow-up.

    `request` is kept only if there is a follow-up, because it holds the images.
    """

    position: int
    request: Request | None = None
    first: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    def follow_up(self, first: str, text: str) -> tuple[Request, _Pending]:
        """The request that continues the prompt with the first answer and the follow-up text."""
        assert self.request is not None
        assert isinstance(self.request.prompt, RenderedPrompt)
        prompt = RenderedPrompt.from_pieces([*self.request.prompt.pieces(), Piece(first, True), Piece(text)])
        params = dataclasses.replace(self.request.params, max_new_tokens=FOLLOW_UP_TOKENS)
        request = dataclasses.replace(self.request, prompt=prompt, params=params, cache_prefix=False)
        return request, _Pending(self.position, first=first, facts=self.facts)

    def answer(self, completion: Completion) -> Answer:
        """The answer to record."""
        text = completion.text if self.first is None else f"{self.first}\n The answer is {completion.text}"
        return self.position, text, None, {**self.facts, "finish_reason": completion.finish_reason}


class LocalModel:
    """`EvalModel` over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batch_size = engine.max_batch_size

    def identity(self, settings: RunSettings) -> dict[str, object]:
        engine, config = self.engine, self.engine.model.config
        example = render_question(get_template(settings.template), "{question}", 1, config)
        return {
            "checkpoint": checkpoint_fingerprint(settings.model_path),
            "template": {"name": settings.template, "text": example},
            "quantization": settings.quantization,
            **({} if settings.follow_up is None else {"follow_up": settings.follow_up}),
            **engine.numerics(),
        }

    def answer(self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings) -> Iterator[Answer]:
        engine, follow_up = self.engine, settings.follow_up
        active: dict[RequestHandle, _Pending] = {}
        submitted = self._submit(questions, order, settings)
        exhausted = False
        while active or not exhausted:
            while not exhausted and len(active) < 2 * engine.max_batch_size:
                item = next(submitted, None)
                if item is None:
                    exhausted = True
                elif isinstance(item[1], LlavaError):
                    yield item[0], "", str(item[1])
                else:
                    active[item[1]] = item[0]
            engine.step()
            for handle in [handle for handle in active if handle.done]:
                completion, pending = handle.result(), active.pop(handle)
                if completion.error:
                    yield pending.position, "", completion.error
                elif follow_up and pending.first is None:
                    request, second = pending.follow_up(completion.text, follow_up)
                    try:
                        active[engine.submit(request)] = second
                    except LlavaError as error:
                        yield pending.position, "", str(error)
                else:
                    yield pending.answer(completion)

    def _submit(
        self, questions: Sequence[Question], order: Iterable[int], settings: RunSettings
    ) -> Iterator[tuple[_Pending, RequestHandle] | tuple[int, LlavaError]]:
        """Submit one question per item, or yield its position and error; holds only the current images."""
        engine, template = self.engine, get_template(settings.template)
        stop = (*settings.params.stop, *stop_strings(template))
        has_follow_up = settings.follow_up is not None
        preprocess: Preprocess | None = None
        if engine.image_processor is not None:
            preprocess = partial(
                preprocess_image, processor=engine.image_processor, aspect_ratio=engine.image_aspect_ratio
            )
        current: Loaded = []
        images: list[HashedImage] = []
        for position, loaded in prefetch(questions, order, settings.source, settings.num_workers, preprocess):
            try:
                if isinstance(loaded, LlavaError):
                    raise loaded
                if loaded is not current:  # consecutive questions with equal images share them
                    current, images = loaded, [_prepare(image, preprocess) for image in loaded]
                question = questions[position]
                text = question.text or question.prompt
                prompt = render_question(template, text, len(images), engine.model.config)
                params = dataclasses.replace(settings.params, stop=stop, seed=settings.seed_for(question))
                # Finished answers are kept only for follow-ups; otherwise they would evict shared prefixes.
                request = Request(prompt, images, params, cache_prefix=has_follow_up)
                handle = engine.submit(request)
                facts = self._facts(prompt, images, handle.prompt_tokens, settings.is_first(position))
                yield _Pending(position, request if has_follow_up else None, facts=facts), handle
            except LlavaError as error:
                yield position, error

    def _facts(self, prompt: str, images: Sequence[HashedImage], prompt_tokens: int, is_first: bool) -> Row:
        sizes = [image.size for image in images]
        tokens = len(images) * self.engine.features.tokens_per_image if images else 0
        facts = input_facts(prompt, [image.digest for image in images], is_first=is_first)
        return {**facts, "image_sizes": sizes, "image_tokens": tokens, "prompt_tokens": prompt_tokens}


def _prepare(image: Image.Image | HashedImage, preprocess: Preprocess | None) -> HashedImage:
    """The preprocessed image with the hash of its pixels."""
    if isinstance(image, HashedImage) or preprocess is None:
        return hash_image(image)
    pixels = hash_image(preprocess(image))
    return dataclasses.replace(pixels, size=image.size)
