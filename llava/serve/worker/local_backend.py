"""Backend of a model in this process: background loading, request validation, and streams of the shared batch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Piece, RenderedPrompt, template_for
from llava.engine.arguments import EngineArgs
from llava.engine.sequence import (
    Completion,
    GuidedDecodingParams,
    HashedImage,
    ImageInput,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from llava.engine.statistics import Statistics
from llava.errors import ContextLengthError, ImageCountError, ImageError, LlavaError, RequestError
from llava.images import preprocess_image
from llava.mm_utils import get_model_name_from_path
from llava.serve.common.protocol import (
    AdapterInfo,
    DetokenizeBody,
    ErrorType,
    GenerateBody,
    ModelInfo,
    ServeError,
    State,
    TokenizeBody,
    TokenLogprob,
)
from llava.serve.worker.backend import Delta, Generation, check_image_count
from llava.serve.worker.preprocess import ImagePreprocessor, Vocabulary
from llava.serve.worker.scheduler import EngineLike, Scheduler, Slot, StreamEvent, completion_error

if TYPE_CHECKING:
    from llava.engine import Engine

logger = logging.getLogger(__name__)

_GREEDY_BELOW: Final = 0.001
_LEAST: Final = -9999.0  # the log probability that the OpenAI API gives to impossible tokens; JSON has no infinity


@dataclass(frozen=True)
class BackendSettings:
    """Limits of a backend; times are in seconds."""

    limit: int = 5
    queue_limit: int = 40
    max_new_tokens: int = 1024
    max_images: int = 16
    keep_alive: float = 2.0  # between two frames of a waiting request
    queue_seconds: float = 120.0  # until the first token
    total_seconds: float = 900.0


def model_info(engine: Engine, model_name: str, conv_mode: str | None, settings: BackendSettings) -> ModelInfo:
    """Public properties of a loaded model."""
    model = engine.model
    image_tokens = int(getattr(model, "num_image_tokens", 0))  # absent from language models
    return ModelInfo(
        conv_template=template_for(model.config, model_name, conv_mode),
        context_length=engine.model_runner.context_length,
        image_tokens=image_tokens,
        max_new_tokens=settings.max_new_tokens,
        max_images=settings.max_images if image_tokens else 0,
        adapters=[
            AdapterInfo(
                name=name,
                root=get_model_name_from_path(str(adapter.path))[:256],
                conv_template=template_for(adapter.config or model.config, name, conv_mode),
            )
            for name, adapter in engine.lora.items()
        ],
    )


class LoadedModel(NamedTuple):
    """An engine, its public properties, and thread-safe preprocessing of prompts and base64 images."""

    engine: EngineLike
    info: ModelInfo
    wraps_images: bool = False  # with <im_start> and <im_end>
    tokenize: Callable[[str], str | Sequence[int]] = lambda text: text
    preprocess: Callable[[str], ImageInput | HashedImage] = ImagePreprocessor(lambda image: image)
    compile_grammar: Callable[[GuidedDecodingParams], object] = lambda params: None
    token_bytes: Sequence[bytes] = ()
    vocabulary: Vocabulary | None = None
    name: str = ""

    def adapter(self, model: str) -> str | None:
        """The adapter that is served under the name `model`; requests to a worker without adapters may have any."""
        names = [adapter.name for adapter in self.info.adapters]
        if names and model not in ("", self.name, *names):
            raise ServeError(ErrorType.NOT_FOUND, f"This worker serves {', '.join([self.name, *names])} only.")
        return model if model in names else None


LoadModel = Callable[[Callable[[float], None]], LoadedModel]  # argument: called with the fraction of weights loaded


def model_loader(
    engine_args: EngineArgs, model_name: str, conv_mode: str | None, settings: BackendSettings
) -> LoadModel:
    """A `load` function for `LocalBackend` that builds the engine of `engine_args`."""

    def load(progress: Callable[[float], None]) -> LoadedModel:
        engine = engine_args.build_engine(progress)
        wraps = bool(getattr(engine.model.config, "mm_use_im_start_end", False))
        info = model_info(engine, model_name, conv_mode, settings)

        def preprocess(image: Image.Image) -> ImageInput:
            return preprocess_image(image, engine.image_processor, engine.image_aspect_ratio)

        def compile_grammar(params: GuidedDecodingParams) -> object:
            return engine.grammars.compile(params)

        vocabulary = Vocabulary(engine)
        return LoadedModel(
            engine,
            info,
            wraps,
            vocabulary.encode,
            ImagePreprocessor(preprocess),
            compile_grammar,
            engine.token_bytes,
            vocabulary,
            model_name,
        )

    return load


def make_request(body: GenerateBody, loaded: LoadedModel, settings: BackendSettings) -> Request:
    """Validate and preprocess a request; raises `ServeError` (400) or `RequestError` when it is invalid."""
    prompt = body.rendered_prompt
    check_image_count(prompt.num_images, len(body.images), loaded.info.max_images)
    tokens = body.prompt_token_ids
    if tokens and prompt:
        raise ServeError(ErrorType.BAD_REQUEST, "The request has a prompt and prompt_token_ids; send one of them.")
    params = SamplingParams(
        max_new_tokens=min(body.max_new_tokens, settings.max_new_tokens),
        temperature=body.temperature if body.temperature > _GREEDY_BELOW else 0.0,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(body.stop),
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        logprobs=body.num_logprobs,
        guided_decoding=_structure_of(body),
    )
    if params.guided_decoding is not None:
        loaded.compile_grammar(params.guided_decoding)  # cached, so that the engine's thread does not compile it
    try:
        prompt_ids = tokens or loaded.tokenize(_as_trained(prompt, loaded))
        if not isinstance(prompt_ids, str):
            _check_length(len(prompt_ids), loaded.info.context_length)
        images = [loaded.preprocess(image) for image in body.images]
        return Request(prompt_ids, images, params, strip=body.strip, lora=loaded.adapter(body.model))
    except ImageError as error:
        raise ServeError(ErrorType.BAD_IMAGE, error.args[0]) from error


def _check_length(least: int, context: int) -> None:
    """Refuse a prompt that is too long without its images, so that the engine's thread does not read its tokens."""
    if least >= context:
        raise ContextLengthError(
            f"The prompt is at least {least} tokens long, and the model's context holds {context} with the answer; "
            "shorten it.",
            prompt_tokens=least,
            image_tokens=0,
            context_length=context,
        )


def _as_trained(prompt: RenderedPrompt, loaded: LoadedModel) -> RenderedPrompt:
    """The prompt with the tags that the checkpoint puts around images."""
    if not loaded.wraps_images:
        return prompt
    return RenderedPrompt.from_pieces(piece if piece.is_text else _wrap_images(piece) for piece in prompt.pieces())


def _structure_of(body: GenerateBody) -> GuidedDecodingParams | None:
    if body.schema_of_answer is not None:
        return GuidedDecodingParams(json=body.schema_of_answer)
    if body.guided_regex is not None:
        return GuidedDecodingParams(regex=body.guided_regex)
    return None if body.guided_choice is None else GuidedDecodingParams(choice=body.guided_choice)


def choices_of(request: Request, count: int) -> list[Request]:
    """A request for each of `count` choices, with consecutive seeds."""
    seed = request.params.seed
    seeds = [seed if seed is None else (seed + index) % 2**63 for index in range(count)]
    return [replace(request, params=replace(request.params, seed=one)) for one in seeds]


def _wrap_images(piece: Piece) -> Piece:
    wrapped = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return Piece(piece.text.replace(wrapped, DEFAULT_IMAGE_TOKEN).replace(DEFAULT_IMAGE_TOKEN, wrapped))


async def _load_in_thread(load: LoadModel, report_progress: Callable[[float], None]) -> LoadedModel:
    """Like `asyncio.to_thread`, but the process does not wait for the thread when it exits."""
    loaded: Future[LoadedModel] = Future()
    loaded.set_running_or_notify_cancel()

    def run() -> None:
        try:
            loaded.set_result(load(report_progress))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(loaded)


class LocalBackend:
    """The `Backend` over `llava.engine`. `load` runs in a thread."""

    features: Final = ["completions", "delta", "messages", "sampling", "text_spans", "tokenize"]

    def __init__(self, load: LoadModel, settings: BackendSettings) -> None:
        self._load = load
        self.settings = settings
        self.scheduler: Scheduler | None = None
        self.info: ModelInfo | None = None
        self.progress: int | None = None
        self._loaded: LoadedModel | None = None
        self._load_failed = False
        self._loading: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(2, "prepare")  # decoding an image may take 100 MB per thread

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

    def statistics(self) -> Statistics | None:
        return None if self._loaded is None else self._loaded.engine.statistics()

    async def start(self, on_change: Callable[[], None]) -> None:
        self._loading = asyncio.ensure_future(self._start(on_change))

    async def _start(self, on_change: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def report_progress(fraction: float) -> None:  # in the loading thread
            percent = 5 * int(20 * fraction)
            if percent != self.progress:
                self.progress = percent
                loop.call_soon_threadsafe(on_change)

        try:
            loaded = await _load_in_thread(self._load, report_progress)
        except Exception as error:  # reported by `state`; the program then exits with status 1
            logger.error("Cannot load the model: %s", error, exc_info=not isinstance(error, LlavaError))
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
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def open(self, body: GenerateBody) -> Generation:
        if self.scheduler is None or self._loaded is None:
            raise ServeError(ErrorType.NOT_READY, "The model is still loading; try again shortly.", retry_after=5)
        slots = self.scheduler.admit_choices(body.n)

        def close() -> None:
            for slot in slots:
                slot.close()

        try:
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._executor, make_request, body, self._loaded, self.settings)
            await self.scheduler.submit(slots, choices_of(request, body.n))
        except BaseException as error:
            close()
            if isinstance(error, RequestError):
                raise request_refusal(error) from error
            raise
        return Generation(self._deltas(slots, len(body.images) * (self._loaded.info.image_tokens or 0)), close)

    def _require_vocabulary(self) -> tuple[LoadedModel, Vocabulary]:
        if self._loaded is None:
            raise ServeError(ErrorType.NOT_READY, "The model is still loading; try again shortly.", retry_after=5)
        if self._loaded.vocabulary is None:
            raise ServeError(ErrorType.BAD_REQUEST, "The engine of this model has no tokenizer.")
        return self._loaded, self._loaded.vocabulary

    def tokenize(self, body: TokenizeBody) -> dict[str, object]:
        loaded, vocabulary = self._require_vocabulary()
        prompt = _as_trained(body.rendered_prompt, loaded)
        try:
            ids = vocabulary.encode(prompt, add_special_tokens=body.add_special_tokens)
        except RequestError as error:
            raise request_refusal(error) from error
        count = len(ids) + ids.count(IMAGE_TOKEN_INDEX) * ((loaded.info.image_tokens or 0) - 1)
        reply = {"count": count, "max_model_len": loaded.info.context_length, "tokens": ids}
        return {**reply, "token_strs": vocabulary.strings(ids)} if body.return_token_strs else reply

    def detokenize(self, body: DetokenizeBody) -> dict[str, object]:
        _, vocabulary = self._require_vocabulary()
        try:
            return {"prompt": vocabulary.decode(body.tokens)}
        except RequestError as error:
            raise request_refusal(error) from error

    async def _deltas(self, slots: Sequence[Slot], image_tokens: int) -> AsyncGenerator[Delta, None]:
        """Deltas of a request, an empty one after `keep_alive` seconds of silence; enforces both deadlines."""
        loop, slot, unfinished = asyncio.get_running_loop(), slots[0], len(slots)
        started, got_text = loop.time(), False
        while True:
            event = None
            with contextlib.suppress(asyncio.TimeoutError):
                event = await asyncio.wait_for(slot.events.get(), self.settings.keep_alive)
            waited = loop.time() - started
            if event is not None:
                got_text = got_text or bool(event.text)
                yield self._delta(event, image_tokens)
                unfinished -= event.completion is not None
                if not unfinished:
                    return
            elif waited > (self.settings.total_seconds if got_text else self.settings.queue_seconds):
                raise ServeError(ErrorType.TIMEOUT, f"No answer within {waited:.0f} seconds.")
            else:
                yield Delta(queue_position=None if got_text else slot.scheduler.waiting)
            if waited > self.settings.total_seconds:
                raise ServeError(ErrorType.TIMEOUT, f"The answer was not complete after {waited:.0f} seconds.")

    def _delta(self, event: StreamEvent, image_tokens: int) -> Delta:
        completion, tokens = event.completion, self._loaded.token_bytes if self._loaded else ()
        delta = Delta(event.text, index=event.choice, logprobs=[_in_words(one, tokens) for one in event.logprobs])
        if completion is None:
            return delta
        if completion.finish_reason == "error":
            raise completion_error(completion)
        usage = usage_of(completion, image_tokens)
        if event.choice:
            usage = {"completion_tokens": usage["completion_tokens"]}
        return replace(delta, finish_reason=completion.finish_reason, usage=usage)


def _in_words(logprobs: TokenLogprobs, tokens: Sequence[bytes]) -> TokenLogprob:
    """Log probabilities in the form of the OpenAI API. Incomplete characters become U+FFFD in `token`."""

    def entry(token: int, logprob: float) -> TokenLogprob:
        data = tokens[token] if token < len(tokens) else b""
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    top = [entry(token, logprob) for token, logprob in logprobs.top]
    return {**entry(logprobs.token, logprobs.logprob), "top_logprobs": top}


def usage_of(completion: Completion, image_tokens: int) -> dict[str, int]:
    """Token counts of a completion."""
    return {
        "prompt_tokens": completion.prompt_tokens,
        "image_tokens": image_tokens,
        "completion_tokens": len(completion.token_ids),
    }


def request_refusal(error: RequestError) -> ServeError:
    """The `ServeError` (400) for a request that the engine refused."""
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
