"""The inference engine: many requests in one batch, joining and leaving at any step, text streamed as it comes.

    engine = load_engine("path/to/checkpoint")
    answers = engine.generate([Request(prompt, [image], SamplingParams(max_new_tokens=64))])

There is no thread inside: whoever holds the engine calls `step()` (iterating a handle does so too). Greedy float32
outputs equal one-at-a-time `model.generate`, token for token, whatever shares the batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.engine import beams
from llava.engine.cache import KVCache
from llava.engine.detokenizer import Detokenizer, SpecialTokens, TextStream
from llava.engine.features import FeatureEncoder
from llava.engine.llama import build_model_runner
from llava.engine.memory import cache_bounds, format_size
from llava.engine.prefill import Prefiller, Prompt
from llava.engine.sampling import NO_TOKEN, Sampler, make_generator
from llava.engine.sequence import Completion, FinishReason, Request, RequestHandle, SamplingParams, Statistics, identify
from llava.errors import ConfigError, ContextLengthError, ImageCountError, RequestError
from llava.mm_utils import tokenizer_image_token
from llava.placement import avoid_cudnn_attention

_NOT_FINITE: Final = "The model computed NaN or infinity for this request; try another dtype, such as bfloat16."


@dataclass(eq=False)
class Job:
    """A request inside the engine: its prompt, what it has produced, and where it stands."""

    prompt: Prompt
    params: SamplingParams
    handle: RequestHandle
    max_new_tokens: int
    end_ids: frozenset[int]
    generator: torch.Generator | None
    detokenizer: Detokenizer
    stream: TextStream
    keep: bool
    columns: int  # of keys and values, at most
    tokens: list[int] = field(default_factory=list)
    read: int = 0  # tokens decoded to text

    def accept(self, token: int) -> FinishReason | None:
        """Append the next token; return the finish reason if no text is needed to know it."""
        if token == NO_TOKEN:
            return "error"
        self.tokens.append(token)
        if token in self.end_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None

    def detokenize(self) -> bool:
        """Decode new tokens to text and hand it over; true when a stop string has ended the answer."""
        for token in self.tokens[self.read :]:
            if token not in self.end_ids and not self.stream.stopped:
                self.handle.push(self.stream.push(self.detokenizer.push(token)))
        self.read = len(self.tokens)
        return self.stream.stopped

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Hand over the rest of the text and the completion."""
        if self.detokenize() and reason == "length":
            reason = "stop"
        self.handle.push(self.stream.push(self.detokenizer.flush(), final=True))
        self.handle.completion = Completion(
            self.stream.text, tuple(self.tokens), reason, self.handle.prompt_tokens, error
        )


class Engine:
    """Continuous batching over one model; `model` is put in evaluation mode.

    `image_aspect_ratio` defaults to the model's own setting. `max_prefill_tokens` bounds what one forward computes of
    prompts, and what running rows wait for between two of their tokens. `kv_cache_bytes` limits the KV cache of running
    requests, others wait; `prefix_cache_bytes` and `feature_cache_bytes` limit the prefixes and image features kept
    for later requests. `llava.engine.memory` has the defaults.

    Threads may share an engine: they take turns in `step`, and in what calls it (`generate`, `stream`, a handle's
    `result`), and all of their requests share the batch. A new model's weights may be
    laid out anew in memory (`llava.engine.linear`), so make the engine after the last change to the modules.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        max_batch_size: int = 16,
        max_prefill_tokens: int | None = None,
        image_aspect_ratio: str | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        feature_cache_bytes: int | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"The batch size is {max_batch_size}; it must be at least 1.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_batch_size = max_batch_size
        self.image_aspect_ratio = image_aspect_ratio or getattr(model.config, "image_aspect_ratio", None)
        self.lm = build_model_runner(model)
        if self.lm.spec.device.type == "cuda":
            avoid_cudnn_attention(self.lm.spec.device)
            torch.cuda.empty_cache()  # fused weights left the segments of the separate ones behind
        self.special = SpecialTokens(tokenizer, model.generation_config)
        bounds = cache_bounds(self.lm.spec, kv_cache_bytes, prefix_cache_bytes, feature_cache_bytes, max_prefill_tokens)
        self.kv_cache_bytes, self.max_prefill_tokens = bounds.kv, bounds.prefill_tokens
        self.features = FeatureEncoder(
            model, image_processor, aspect_ratio=self.image_aspect_ratio, budget=bounds.features
        )
        self.prefiller = Prefiller(
            self.lm, self.features, max_tokens=bounds.prefill_tokens, prefix_budget=bounds.prefix
        )
        self.generated_tokens = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._cache = KVCache(self.lm.spec, budget=self.kv_cache_bytes)
        # There the previous step is detokenised while the GPU computes this one.
        self._on_cuda = self.lm.spec.device.type == "cuda"
        self._turn = threading.RLock()

    def submit(self, request: Request) -> RequestHandle:
        """Queue a request. Raises `RequestError` when it cannot be served: image count, length, parameters."""
        prompt = self._prepare(request)
        images = len(prompt.pictures)
        feature_tokens = images * (self.features.tokens_per_image if images else 0)
        length, context = len(prompt.ids) - images + feature_tokens, self.lm.context_length
        if length >= context:
            raise ContextLengthError(
                f"The prompt is {length} tokens long ({len(prompt.ids) - images} of text, {feature_tokens} of {images} "
                f"image(s)), and the model's context holds {context} with the answer; shorten the conversation.",
                prompt_tokens=length,
                image_tokens=feature_tokens,
                context_length=context,
            )
        params = request.params
        new_tokens = min(params.max_new_tokens, context - length)
        needed = (length + new_tokens) * self.lm.spec.column_bytes
        if self.kv_cache_bytes is not None and needed > self.kv_cache_bytes:
            raise RequestError(
                f"The request needs {format_size(needed)} of KV cache ({length} prompt + {new_tokens} new tokens), and "
                f"the limit is {format_size(self.kv_cache_bytes)}; ask for fewer new tokens, or raise "
                "--kv-cache-memory (kv_cache_bytes)."
            )
        handle = RequestHandle(self.step, length)
        job = Job(
            prompt=prompt,
            params=params,
            handle=handle,
            max_new_tokens=new_tokens,
            end_ids=self.special.end_ids(params.stop),
            generator=make_generator(params),
            detokenizer=Detokenizer(self.tokenizer, self.special),
            stream=TextStream(params.stop),
            keep=request.keep,
            columns=length + new_tokens,
        )
        self._waiting.append(job)
        return handle

    @torch.inference_mode()
    def step(self) -> bool:
        """Drop cancelled requests, admit waiting ones, advance every running row by a token. False when idle."""
        with self._turn:
            self._drop_cancelled()
            self._admit()
            if self._running:
                self._decode()
            busy = bool(self._running or self._waiting)
            if not busy and self._on_cuda:  # on a CPU, new memory costs more than the old one is worth
                self._cache.release()
            return busy

    @property
    def running(self) -> int:
        """How many requests share the batch now; the others in flight wait for a row."""
        return len(self._running)

    def abort(self, error: str) -> None:
        """Finish every request in flight with an error and forget its rows: what is left to do after a failed step."""
        with self._turn:
            for job in [*self._running, *self._waiting]:
                if not job.handle.done:
                    job.finish("error", error)
            self._running.clear()
            self._waiting.clear()
            self._cache = KVCache(self.lm.spec, budget=self.kv_cache_bytes)

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """Answer all requests, in order. `progress` is called with the number newly finished after each step.

        When one of them is refused, a step fails or the user interrupts, the others are cancelled.
        """
        named = {id(image): identify(image) for request in requests for image in request.images}
        handles: list[RequestHandle] = []
        try:
            for one in requests:
                handles.append(self.submit(replace(one, images=[named[id(image)] for image in one.images])))
            finished = 0
            while finished < len(handles):
                self.step()
                now = sum(handle.done for handle in handles)
                if progress is not None and now > finished:
                    progress(now - finished)
                finished = now
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return [handle.result() for handle in handles]

    def stream(self, request: Request) -> Iterator[str]:
        """Text of one answer as it comes; the pieces join to the completion's text. Closing it cancels the request."""
        handle = self.submit(request)

        def pieces() -> Iterator[str]:
            try:
                yield from handle
            finally:
                handle.cancel()

        return pieces()

    def _prepare(self, request: Request) -> Prompt:
        ids = self._ids(request.prompt)
        tags = ids.count(IMAGE_TOKEN_INDEX)
        if tags != len(request.images):
            raise ImageCountError(
                f"The prompt has {tags} {DEFAULT_IMAGE_TOKEN} placeholder(s) but {len(request.images)} image(s) were "
                "given; send one image per placeholder."
            )
        if not ids:
            raise RequestError("The prompt is empty; send at least one token.")
        return Prompt(ids, tuple(identify(image) for image in request.images))

    def _ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The prompt's tokens; `RequestError` for text or ids that the model cannot read."""
        try:
            if isinstance(prompt, str):
                prompt.encode()
                ids = tuple(tokenizer_image_token(prompt, self.tokenizer))
            else:
                ids = tuple(map(index, prompt))
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"The prompt is neither text nor token ids ({error}).") from error
        rows = len(self.lm.core.get_input_embeddings().weight)
        strange = [token for token in ids if not 0 <= token < rows and token != IMAGE_TOKEN_INDEX]
        if strange:
            raise RequestError(f"The prompt has token {strange[0]}; this model's tokens are 0 to {rows - 1}.")
        return ids

    def _drop_cancelled(self) -> None:
        for job in [job for job in list(self._waiting) if job.handle.cancelled]:
            self._waiting.remove(job)
            job.finish("cancelled")
        for row in reversed(range(len(self._running))):
            if self._running[row].handle.cancelled:
                self._release(row, "cancelled")

    def statistics(self) -> Statistics:
        """Work done and memory held."""
        prefiller, features = self.prefiller, self.features
        return Statistics(
            generated_tokens=self.generated_tokens,
            computed_tokens=prefiller.computed_tokens,
            shared_tokens=prefiller.shared_tokens,
            encoded_images=features.encoded,
            running=len(self._running),
            waiting=len(self._waiting),
            row_bytes=self._cache.data.nbytes,
            prefix_bytes=prefiller.prefixes.bytes,
            feature_bytes=features.store.bytes,
        )

    def _take(self) -> list[Job]:
        """Waiting requests to start now. Under a backlog none before a quarter of the batch is free: prompts run in
        batches. Beside running rows, only as many as `max_prefill_tokens` allow, so that these do not wait long."""
        free = self.max_batch_size - len(self._running)
        if self._running and free < min(len(self._waiting), self.max_batch_size // 4):
            return []
        jobs: list[Job] = []
        columns = max((job.columns for job in self._running), default=0)
        tokens, before = 0, None
        while self._waiting and len(jobs) < free:
            job = self._waiting[0]
            tokens += self.prefiller.new_tokens(job.prompt, before)
            if jobs and self._running and tokens > self.max_prefill_tokens:
                break
            columns = max(columns, job.columns)
            bytes_needed = (len(self._running) + len(jobs) + 1) * columns * self.lm.spec.column_bytes
            if self.kv_cache_bytes is not None and bytes_needed > self.kv_cache_bytes:
                break
            jobs.append(self._waiting.popleft())
            before = job.prompt
        return jobs

    def _admit(self) -> None:
        """Prefill waiting requests, as many as `_take` gives."""
        jobs = self._take()
        if not jobs:
            return
        expected = [job.prompt for job in list(self._waiting)[: 2 * self.max_batch_size]]
        batch = [job for job in jobs if job.params.num_beams == 1]
        try:
            for job in jobs:
                if job.params.num_beams > 1:
                    beams.run(self.lm, self.prefiller, job)
            for part in self.prefiller.run([job.prompt for job in batch], expected):
                self._cache.join(part.data, part.lengths, part.chains)
                started = [batch[index] for index in part.indices]
                self._running.extend(started)
                self._accept(len(self._running) - len(started), _sampler(started).sample(part.logits))
        except Exception as error:
            for job in jobs:
                if not job.handle.done and job not in self._running:
                    job.finish("error", f"{type(error).__name__}: {error}")
            raise

    def _decode(self) -> None:
        """One token for every running row."""
        sampler = _sampler(self._running)
        logits = self.lm.decode([job.tokens[-1] for job in self._running], self._cache, sampler)
        self._accept(0, sampler.sample(logits))

    def _accept(self, first: int, tokens: Tensor) -> None:
        """Take the next `tokens` (n,) of rows `first` onwards, and release rows that are done.

        With `_on_cuda` the GPU is still computing them, and a stop string in the previous step's text is only found
        now: then the row's new token is dropped.
        """
        jobs = self._running[first:]
        if self._on_cuda:
            for job in jobs:
                job.detokenize()
        found = tokens.tolist()
        for offset in reversed(range(len(jobs))):
            job = jobs[offset]
            reason: FinishReason | None = "stop"
            if not job.stream.stopped:
                self.generated_tokens += 1
                reason = job.accept(found[offset])
                if reason is None and not self._on_cuda and job.detokenize():
                    reason = "stop"
            if reason is not None:
                self._release(first + offset, reason, _NOT_FINITE if reason == "error" else None)

    def _release(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        """Free a row; the last row takes its number, in the cache and here."""
        job = self._running[row]
        if job.keep and reason in ("stop", "length"):
            cached = job.tokens[: self._cache.position(row) - job.handle.prompt_tokens]
            self.prefiller.keep(job.prompt, cached, self._cache.chains[row], self._cache.row(row))
        self._cache.drop(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        job.finish(reason, error)


def _sampler(jobs: Sequence[Job]) -> Sampler:
    return Sampler([job.params for job in jobs], [job.generator for job in jobs])


# --- From a checkpoint directory to a ready engine --------------------------------------------------------------------


def load_engine(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    max_batch_size: int = 16,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Engine:
    """Load a checkpoint and wrap it in an engine; `options` go to `Engine`, `loading` to
    `load_pretrained_model`: `vision_tower`, `num_gpus`, `max_memory`, `device_map`, `attn_implementation`, `text_only`,
    `progress`.

    `device` and `dtype` default to what the machine and the checkpoint suggest, see `llava.placement`.
    """
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.placement import resolve_device

    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(model_path),
        None if model_base is None else str(model_base),
        get_model_name_from_path(str(model_path)),
        load_8bit,
        load_4bit,
        device=str(resolve_device(device)),
        dtype=dtype,
        **(loading or {}),
    )
    return Engine(model, tokenizer, image_processor, max_batch_size=max_batch_size, **options)
