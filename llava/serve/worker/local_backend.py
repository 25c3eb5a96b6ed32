"""A model in this process: loading in the background, checking requests, and answers from the shared batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import template_for
from llava.engine.arguments import EngineArgs
from llava.engine.sequence import Completion, HashedImage, ImageInput, Request, SamplingParams
from llava.errors import ContextLengthError, ImageCountError, ImageError, LlavaError, RequestError
from llava.images import preprocess_image
from llava.serve.common.protocol import ErrorType, GenerateBody, ModelInfo, ServeError, State
from llava.serve.worker.backend import Answer, Piece
from llava.serve.worker.preprocess import Pictures, tokenizer_for
from llava.serve.worker.scheduler import EngineLike, Scheduler, StreamEvent, Ticket, failure_of

logger = logging.getLogger(__name__)

_GREEDY_BELOW: Final = 0.001


@dataclass(frozen=True)
class Settings:
    """How a worker shares its model out. Times are seconds."""

    limit: int = 5
    queue_limit: int = 40
    max_new_tokens: int = 1024
    max_images: int = 16
    keep_alive: float = 2.0  # between frames while nothing is generated
    queue_seconds: float = 120.0  # until the first token
    total_seconds: float = 900.0


def describe(engine: Any, model_name: str, conv_mode: str | None, settings: Settings) -> ModelInfo:
    """What clients are told about a loaded model."""
    model = engine.model
    image_tokens = int(getattr(model, "num_image_tokens", 0))
    return ModelInfo(
        conv_template=template_for(model.config, model_name, conv_mode),
        context_length=engine.model_runner.context_length,
        image_tokens=image_tokens,
        max_new_tokens=settings.max_new_tokens,
        max_images=settings.max_images if image_tokens else 0,
    )


class Loaded(NamedTuple):
    """An engine, what clients are told about it, and how texts and pictures are made ready for it, in any thread."""

    engine: EngineLike
    info: ModelInfo
    wraps_images: bool = False
    tokenize: Callable[[str], str | Sequence[int]] = lambda text: text
    pictures: Callable[[str], ImageInput | HashedImage] = Pictures(lambda image: image)


Load = Callable[[Callable[[float], None]], Loaded]  # is given what to tell the share of the weights it has read


def loader(engine_args: EngineArgs, model_name: str, conv_mode: str | None, settings: Settings) -> Load:
    """A `load` function for `LocalModel` that builds the engine of `engine_args`."""

    def load(progress: Callable[[float], None]) -> Loaded:
        engine = engine_args.build_engine(progress)
        wraps = bool(getattr(engine.model.config, "mm_use_im_start_end", False))
        info = describe(engine, model_name, conv_mode, settings)

        def pixels(image: Image.Image) -> ImageInput:
            return preprocess_image(image, engine.image_processor, engine.image_aspect_ratio)

        return Loaded(engine, info, wraps, tokenizer_for(engine), Pictures(pixels))

    return load


class LocalModel:
    """The `Backend` over `llava.engine`. `load` runs in a thread."""

    features: Final = ["delta", "messages"]

    def __init__(self, load: Load, settings: Settings) -> None:
        self._load = load
        self.settings = settings
        self.scheduler: Scheduler | None = None
        self.info: ModelInfo | None = None
        self.progress: int | None = None
        self._loaded: Loaded | None = None
        self._load_failed = False
        self._loading: asyncio.Task[None] | None = None
        self._preparing = ThreadPoolExecutor(2, "prepare")  # a picture may take 100 MB while it is decoded

    @property
    def state(self) -> State:
        if self._load_failed or (self.scheduler is not None and self.scheduler.failure):
            return "failed"
        return "loading" if self.scheduler is None else "ready"

    @property
    def in_use(self) -> int:
        return 0 if self.scheduler is None else self.scheduler.in_use

    @property
    def running(self) -> int:
        return 0 if self.scheduler is None else self.scheduler.running

    async def start(self, on_change: Callable[[], None]) -> None:
        self._loading = asyncio.ensure_future(self._start(on_change))

    async def _start(self, on_change: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def tell(share: float) -> None:  # in the loading thread
            percent = 5 * int(20 * share)
            if percent != self.progress:
                self.progress = percent
                loop.call_soon_threadsafe(on_change)

        try:
            loaded = await asyncio.to_thread(self._load, tell)
        except Exception as error:  # the process stays up to say so; its supervisor sees the exit status
            logger.error("The model cannot be loaded: %s", error, exc_info=not isinstance(error, LlavaError))
            self._load_failed = True
        else:
            self._loaded, self.info = loaded, loaded.info
            self.scheduler = Scheduler(loaded.engine, self.settings.limit, self.settings.queue_limit)
            self.scheduler.on_failure = on_change
        on_change()

    async def stop(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
        if self.scheduler is not None:
            await self.scheduler.stop()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def open(self, body: GenerateBody) -> Answer:
        if self.scheduler is None or self._loaded is None:
            raise ServeError(ErrorType.NOT_READY, "The model is still loading; try again shortly.", retry_after=5)
        ticket = self.scheduler.admit()
        try:
            await ticket.submit(await self._prepare(body, self._loaded))
        except BaseException as error:
            ticket.close()
            if isinstance(error, RequestError):
                raise refusal_of(error) from error
            raise
        return Answer(self._follow(ticket, len(body.images) * self._loaded.info.image_tokens), ticket.close)

    async def _prepare(self, body: GenerateBody, loaded: Loaded) -> Request:
        """The engine's request, checked and ready as far as no engine is needed."""
        tags, images = body.prompt.count(DEFAULT_IMAGE_TOKEN), len(body.images)
        if tags != images:
            raise ServeError(
                ErrorType.IMAGE_COUNT_MISMATCH,
                f"The prompt has {tags} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {images} image(s) came with it; "
                "send one image per placeholder.",
                placeholders=tags,
                images=images,
            )
        most = loaded.info.max_images
        if images > most:
            raise ServeError(ErrorType.BAD_REQUEST, f"{images} images were sent; this model takes {most}.")
        prompt = body.prompt
        wrapped = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        if loaded.wraps_images:
            prompt = prompt.replace(wrapped, DEFAULT_IMAGE_TOKEN).replace(DEFAULT_IMAGE_TOKEN, wrapped)
        params = SamplingParams(
            max_new_tokens=min(body.max_new_tokens, self.settings.max_new_tokens),
            temperature=body.temperature if body.temperature > _GREEDY_BELOW else 0.0,
            top_p=body.top_p,
            seed=body.seed,
            stop=tuple(body.stop),
        )
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(self._preparing, loaded.tokenize, prompt)
            pictures = [await loop.run_in_executor(self._preparing, loaded.pictures, image) for image in body.images]
        except ImageError as error:
            raise ServeError(ErrorType.BAD_IMAGE, error.args[0]) from error
        return Request(ids, pictures, params)

    async def _follow(self, ticket: Ticket, image_tokens: int) -> AsyncGenerator[Piece, None]:
        """Pieces as they come, an empty one every `keep_alive` seconds of silence, and the two deadlines."""
        loop = asyncio.get_running_loop()
        started, got_text = loop.time(), False
        while True:
            news = await self._next(ticket)
            waited = loop.time() - started
            if news is not None:
                got_text = got_text or bool(news.text)
                yield self._piece(news, ticket, image_tokens)
                if news.completion is not None:
                    return
            elif waited > (self.settings.total_seconds if got_text else self.settings.queue_seconds):
                raise ServeError(ErrorType.TIMEOUT, f"No answer came within {waited:.0f} seconds.")
            else:
                yield Piece(position=None if got_text else self._ahead())
            if waited > self.settings.total_seconds:
                raise ServeError(ErrorType.TIMEOUT, f"The answer was not complete after {waited:.0f} seconds.")

    async def _next(self, ticket: Ticket) -> StreamEvent | None:
        try:
            return await asyncio.wait_for(ticket.news.get(), self.settings.keep_alive)
        except asyncio.TimeoutError:
            return None

    def _ahead(self) -> int:
        return 0 if self.scheduler is None else self.scheduler.waiting

    @staticmethod
    def _piece(news: StreamEvent, ticket: Ticket, image_tokens: int) -> Piece:
        completion = news.completion
        if completion is None:
            return Piece(news.text)
        if completion.finish_reason == "error":
            raise failure_of(completion)
        return Piece(news.text, completion.finish_reason, usage_of(completion, image_tokens))


def usage_of(completion: Completion, image_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "image_tokens": image_tokens,
        "completion_tokens": len(completion.token_ids),
    }


def refusal_of(error: RequestError) -> ServeError:
    """An engine's refusal, as the client is told."""
    text = str(error.args[0])
    if isinstance(error, ContextLengthError):
        return ServeError(
            ErrorType.CONTEXT_TOO_LONG,
            text,
            prompt_tokens=error.prompt_tokens,
            image_tokens=error.image_tokens,
            context_length=error.context_length,
        )
    kind = ErrorType.IMAGE_COUNT_MISMATCH if isinstance(error, ImageCountError) else ErrorType.BAD_REQUEST
    return ServeError(kind, text)
