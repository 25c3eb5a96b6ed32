"""Inference engine: continuous batching, prefix caching and streaming over one model.

    engine = load_engine("path/to/checkpoint")
    answers = engine.generate([Request(prompt, [image], SamplingParams(max_new_tokens=64))])

The engine has no thread: its user calls `step()`, or iterates a handle. Greedy float32 outputs equal those of
`model.generate` for one request at a time, token for token.
"""

from __future__ import annotations

import threading
from collections import abc
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.engine.cache import KVCache, cache_bounds, format_size
from llava.engine.detokenizer import Detokenizer, SpecialTokens, TextStream, token_bytes
from llava.engine.features import FeatureEncoder
from llava.engine.guided import GrammarCompiler
from llava.engine.llama import build_model_runner
from llava.engine.logits import TokenTable, download, token_logprobs
from llava.engine.lora import LoraWeights
from llava.engine.prefill import Prefiller, PrefillOutput
from llava.engine.sampling import NO_TOKEN, Sampler, make_generator
from llava.engine.sequence import (
    Completion,
    FinishReason,
    Prompt,
    Request,
    RequestHandle,
    Sequence,
    TokenLogprobs,
    hash_image,
)
from llava.engine.statistics import Clock, Statistics
from llava.engine.token_budget import StepBudget, TokenBudget, TokenLimit
from llava.engine.waiting import WaitingQueue
from llava.errors import ConfigError, ContextLengthError, ImageCountError, RequestError
from llava.mm_utils import encode_prompt, get_model_name_from_path
from llava.placement import avoid_cudnn_attention, resolve_device

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from llava.model.lora_adapter import LoraAdapter


class Engine:
    """Continuous batching over one model, which is set to evaluation mode.

    `image_aspect_ratio` defaults to the model's setting. `max_prefill_tokens` limits the prompt tokens of one forward
    pass, `max_num_batched_tokens` the tokens of a step in which requests decode, and so the time they wait between two
    tokens: a number, "auto" (`llava.engine.token_budget`), or None for no limit. `kv_cache_bytes` limits the KV cache
    of running requests, others wait; `prefix_cache_bytes` and `feature_cache_bytes` limit the prefixes and image
    features cached for later requests. The defaults are those of `llava.engine.cache.cache_bounds`. `lora` are adapters
    of the model that requests may name.

    Threads may share an engine: they take turns in `step` and its callers (`generate`, `stream`, `result`), and all
    their requests share the batch. The engine fuses weights in memory (`llava.engine.layers`), so create it after the
    last change to the model's modules.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: CLIPImageProcessor | None = None,
        *,
        max_batch_size: int = 16,
        max_prefill_tokens: int | None = None,
        max_num_batched_tokens: TokenLimit = None,
        image_aspect_ratio: str | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        feature_cache_bytes: int | None = None,
        lora: abc.Sequence[LoraAdapter] = (),
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size (--batch-size) must be at least 1, got {max_batch_size}.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_batch_size = max_batch_size
        self.image_aspect_ratio = image_aspect_ratio or getattr(model.config, "image_aspect_ratio", None)
        self.model_runner = build_model_runner(model)
        spec = self.model_runner.spec
        if len({adapter.name for adapter in lora}) < len(lora):
            raise ConfigError(f"LoRA adapters need different names, got {', '.join(one.name for one in lora)}.")
        self.lora = {adapter.name: adapter for adapter in lora}
        self._adapters = {name: number for number, name in enumerate(self.lora, 1)}
        if self.lora:
            self.model_runner.set_lora(LoraWeights(model, lora, spec.dtype))
        # On CUDA the previous step is detokenised while the GPU computes the current one.
        self._on_cuda = spec.device.type == "cuda"
        if self._on_cuda:
            avoid_cudnn_attention(spec.device)
            torch.cuda.empty_cache()  # return the memory of the unfused weights
        self.special = SpecialTokens(tokenizer, model.generation_config)
        bounds = cache_bounds(spec, kv_cache_bytes, prefix_cache_bytes, feature_cache_bytes, max_prefill_tokens)
        self.kv_cache_bytes, self.max_prefill_tokens = bounds.kv, bounds.prefill_tokens
        self.features = FeatureEncoder(model, image_processor, self.image_aspect_ratio, bounds.features)
        self.features.projectors += [adapter.projector for adapter in self.lora.values()]
        self.clock = Clock()
        self.prefiller = Prefiller(self.model_runner, self.features, bounds.prefill_tokens, bounds.prefix, self.clock)
        self.generated_tokens = self.decode_steps = self.decode_rows = 0
        self._waiting = WaitingQueue(self.prefiller, max_batch_size, self.kv_cache_bytes, spec.bytes_per_token)
        self._running: list[Sequence] = []  # by row of the KV cache
        self._cache = KVCache(spec, budget=self.kv_cache_bytes, max_rows=max_batch_size)
        self._budget = TokenBudget(max_num_batched_tokens, spec.device.type, self.features)
        self._lock = threading.RLock()

    def submit(self, request: Request) -> RequestHandle:
        """Queue a request. Raises `RequestError` if it cannot be served: wrong image count, too long, bad tokens."""
        prompt = self._prepare(request)
        images = len(prompt.images)
        feature_tokens = images * (self.features.tokens_per_image if images else 0)
        length, context = len(prompt.ids) - images + feature_tokens, self.model_runner.context_length
        if length >= context:
            raise ContextLengthError(
                f"The prompt is {length} tokens long ({len(prompt.ids) - images} of text, {feature_tokens} of {images} "
                f"image(s)), and the model's context holds {context} with the answer; shorten the conversation.",
                prompt_tokens=length,
                image_tokens=feature_tokens,
                context_length=context,
            )
        params = request.params
        self._check_ids(params.logit_bias, "logit_bias")
        new_tokens = min(params.max_new_tokens, context - length)
        needed = (length + new_tokens) * self.model_runner.spec.bytes_per_token
        if self.kv_cache_bytes is not None and needed > self.kv_cache_bytes:
            raise RequestError(
                f"The request needs {format_size(needed)} of KV cache ({length} prompt + {new_tokens} new tokens), and "
                f"the limit is {format_size(self.kv_cache_bytes)}; ask for fewer new tokens, or raise "
                "--kv-cache-memory (kv_cache_bytes)."
            )
        handle = RequestHandle(self.step, length)
        sequence = Sequence(
            prompt=prompt,
            params=params,
            handle=handle,
            max_new_tokens=new_tokens,
            end_ids=self.special.end_ids(params.stop),
            generator=make_generator(params),
            detokenizer=Detokenizer(self.tokenizer, self.special, () if request.strip else prompt.ids),
            stream=TextStream(params.stop, strip=request.strip),
            cache_prefix=request.cache_prefix,
            max_tokens=length + new_tokens,
            table=TokenTable.build(params, prompt.ids),
        )
        if params.guided_decoding is not None:
            sequence.guide = self.grammars.start(params.guided_decoding, sequence.end_ids)
        self._waiting.append(sequence)
        return handle

    @torch.inference_mode()
    def step(self) -> bool:
        """Drop cancelled requests, prefill waiting ones, and decode one token per running one. False when idle."""
        with self._lock, self.clock.measure("other"):
            self._drop_cancelled()
            budget = self._budget.begin(self._running, len(self._waiting))
            self._prefill(budget)
            self._budget.prefilled()
            rows = len(self._running)
            if rows:
                self._decode()
            self._budget.end(budget, rows)
            busy = bool(self._running or self._waiting)
            if not busy and self._on_cuda:  # on a CPU, allocating it again costs more than keeping it
                self._cache.release()
            return busy

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return len(self._running)

    def abort(self, error: str) -> None:
        """Finish all requests with an error and reset the KV cache, after a failed step."""
        with self._lock:
            for sequence in [*self._running, *self._waiting]:
                if not sequence.handle.done:
                    sequence.finish("error", error)
            self._running.clear()
            self._waiting.clear()
            self._cache = KVCache(self.model_runner.spec, budget=self.kv_cache_bytes, max_rows=self.max_batch_size)

    def generate(
        self, requests: abc.Sequence[Request], progress: abc.Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Answer all requests, in order. `progress` is called with the number of requests finished by each step.

        If a request is refused, a step fails or the user interrupts, all of them are cancelled.
        """
        images = [list(request.images) for request in requests]
        distinct = {id(image): image for some in images for image in some}
        hashed = {key: hash_image(image) for key, image in distinct.items()}
        handles: list[RequestHandle] = []
        try:
            for request, some in zip(requests, images, strict=True):
                handles.append(self.submit(replace(request, images=[hashed[id(image)] for image in some])))
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

    def stream(self, request: Request) -> abc.Iterator[str]:
        """Stream the text of one answer; the pieces join to the completion's text. Closing it cancels the request."""
        handle = self.submit(request)

        def pieces() -> abc.Iterator[str]:
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
        images = tuple(hash_image(image) for image in request.images)
        number = 0 if request.lora is None else self._adapters.get(request.lora)
        if number is None:
            known = ", ".join(self._adapters) or "none"
            raise RequestError(f"The engine has no LoRA adapter {request.lora!r}; its adapters: {known}.")
        if self.features.projectors[number] is not None:
            images = tuple(image.projected_by(number) for image in images)
        return Prompt(ids, images, number)

    def _ids(self, prompt: str | abc.Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt. Raises `RequestError` for invalid text and for ids outside the vocabulary."""
        try:
            if isinstance(prompt, str):
                prompt.encode()
                ids = tuple(encode_prompt(prompt, self.tokenizer))
            else:
                ids = tuple(map(index, prompt))
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"The prompt must be text or token ids: {error}.") from error
        self._check_ids((token for token in ids if token != IMAGE_TOKEN_INDEX), "the prompt")
        return ids

    @cached_property
    def vocabulary(self) -> int:
        """Number of rows of the embeddings, which is at least the number of tokens."""
        return len(self.model_runner.core.get_input_embeddings().weight)

    def _check_ids(self, ids: abc.Iterable[int], where: str) -> None:
        unknown = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if unknown is not None:
            raise RequestError(f"Token ids of {where} must be in [0, {self.vocabulary - 1}], got {unknown}.")

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiler of `SamplingParams.guided_decoding`. Raises `RequestError` if structured output is not available."""
        return GrammarCompiler(self.tokenizer, self.token_bytes, self.special, self.vocabulary)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token; `Detokenizer` decodes an answer."""
        return token_bytes(self.tokenizer)

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self._waiting if sequence.handle.cancelled]:
            self._waiting.remove(sequence)
            sequence.finish("cancelled")
        for row in reversed(range(len(self._running))):
            if self._running[row].handle.cancelled:
                self._release(row, "cancelled")

    def numerics(self) -> dict[str, str | None]:
        """Settings on which answers depend beside the checkpoint: preprocessing, dtype, attention and device."""
        return {
            "image_aspect_ratio": self.image_aspect_ratio,
            "dtype": str(self.model_runner.spec.dtype).removeprefix("torch."),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "device": self.model_runner.spec.device.type,
        }

    def statistics(self) -> Statistics:
        """Counters, load and memory of the engine."""
        prefiller, features = self.prefiller, self.features
        return Statistics(
            requests=self._waiting.started,
            waiting_seconds=self._waiting.waiting_seconds,
            prompt_tokens=prefiller.prompt_tokens,
            computed_tokens=prefiller.computed_tokens,
            prefill_chunks=prefiller.chunks,
            cached_tokens=prefiller.cached_tokens,
            prefix_hits=prefiller.hits,
            prefix_evictions=prefiller.prefix_cache.evictions,
            images=prefiller.images,
            encoded_images=features.encoded,
            feature_hits=features.hits,
            feature_evictions=features.store.evictions,
            generated_tokens=self.generated_tokens,
            decode_steps=self.decode_steps,
            decode_rows=self.decode_rows,
            running=len(self._running),
            waiting=len(self._waiting),
            max_batch_size=self.max_batch_size,
            kv_bytes=self._cache.nbytes,
            prefix_bytes=prefiller.prefix_cache.bytes,
            feature_bytes=features.store.bytes,
            seconds=self.clock.seconds(),
        )

    def _prefill(self, budget: StepBudget) -> None:
        """Prefill the scheduled sequences and a chunk of a long prompt, and sample the first tokens."""
        queue = self._waiting
        started = queue.schedule(self._running, budget)
        batch = [sequence for sequence in started if sequence.params.num_beams == 1]
        prompts, later = [sequence.prompt for sequence in batch], queue.next_prompts(2 * self.max_batch_size)
        with self._failing(started):
            for sequence in started:
                if sequence.params.num_beams > 1:
                    self._beam_search(sequence)
            with self.clock.measure("prefill"):
                for output in self.prefiller.run(prompts, later) if batch else ():
                    self._join(output, [batch[index] for index in output.indices])
        if queue.chunked is not None:
            long, prefill = queue.chunked
            with self._failing([long]), self.clock.measure("prefill"):
                done = self.prefiller.advance(prefill, budget)
                if done is not None:
                    queue.remove(long)
                    self._join(done, [long])

    @contextmanager
    def _failing(self, sequences: list[Sequence]) -> abc.Iterator[None]:
        """Finish those of `sequences` that did not get into the batch with the exception that the block raises."""
        try:
            yield
        except Exception as error:
            for sequence in sequences:
                if not sequence.handle.done and sequence not in self._running:
                    self._waiting.remove(sequence)
                    sequence.finish("error", f"{type(error).__name__}: {error}")
            raise

    def _join(self, output: PrefillOutput, rows: list[Sequence]) -> None:
        """Add prefilled rows to the batch and sample their first tokens."""
        self._cache.join(output.data, output.lengths, output.prefixes)
        self._running.extend(rows)
        self._append(len(self._running) - len(rows), Sampler.of(rows), output.logits)

    def _beam_search(self, sequence: Sequence) -> None:
        """Answer one sequence with transformers' `generate` over its embeddings, outside the batch."""
        params, spec = sequence.params, self.model_runner.spec
        sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
        embeds = self.prefiller.embed(sequence.prompt)  # (L, D)
        # The default would initialise every GPU.
        devices = {device for device in (spec.device, *spec.layer_devices) if device.type == "cuda"}
        adapted = self.model_runner.adapted([sequence.prompt.adapter])
        with torch.random.fork_rng(devices, enabled=params.temperature > 0), self.clock.measure("decode"), adapted:
            if params.seed is not None:
                torch.manual_seed(params.seed)
            output = self.model.generate(
                inputs_embeds=embeds.unsqueeze(0),
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=embeds.device),
                num_beams=params.num_beams,
                max_new_tokens=sequence.max_new_tokens,
                bos_token_id=0,  # without input ids, `generate` starts its output with this token
                eos_token_id=sorted(sequence.end_ids),
                pad_token_id=self.model.generation_config.pad_token_id or 0,
                **(sampling if params.temperature > 0 else {"do_sample": False}),
            )
        for token in output[0, 1:].tolist():
            self.generated_tokens += 1
            reason = sequence.append(token)
            if reason is not None or sequence.detokenize():
                sequence.finish(reason or "stop")
                return
        sequence.finish("stop")

    def _decode(self) -> None:
        """Decode one token for every running row."""
        sampler = Sampler.of(self._running)
        self.decode_steps += 1
        self.decode_rows += len(self._running)
        with self.clock.measure("decode"):
            adapters = [sequence.prompt.adapter for sequence in self._running] if self.lora else ()
            tokens = [sequence.tokens[-1] for sequence in self._running]
            logits = self.model_runner.decode(tokens, self._cache, sampler, adapters)
        self._append(0, sampler, logits)

    def _append(self, first: int, sampler: Sampler, logits: Tensor) -> None:
        """Sample tokens from `logits` (n, V), append them to the rows from `first` on, and free the finished rows.

        With `_on_cuda` the GPU is still computing them while the previous step's text is decoded; a row whose text
        ended with a stop string drops its new token.
        """
        rows, count = self._running[first:], sampler.num_logprobs
        with self.clock.measure("sampling"):
            tokens = sampler.sample(logits)
            reported = None if count is None else token_logprobs(logits, tokens, count)
        if self._on_cuda:
            with self.clock.measure("detokenize"):
                for sequence in rows:
                    sequence.detokenize()
        with self.clock.measure("sampling"):
            found, logprobs = download(tokens, reported, sampler.params)
        with self.clock.measure("detokenize"):
            self._extend(first, found, logprobs)

    def _extend(self, first: int, found: abc.Sequence[int], logprobs: abc.Sequence[TokenLogprobs | None]) -> None:
        """Append a new token to each of the rows from `first` on, and free the rows that are finished."""
        rows = self._running[first:]
        for offset in reversed(range(len(rows))):
            sequence = rows[offset]
            reason: FinishReason | None = "stop"
            if not sequence.stream.stopped:
                self.generated_tokens += 1
                reason = "error" if found[offset] == NO_TOKEN else sequence.append(found[offset])
                sequence.add_logprobs(logprobs[offset])
                if reason is None and not self._on_cuda and sequence.detokenize():
                    reason = "stop"
            if reason is not None:
                self._release(first + offset, reason, sequence.failure if reason == "error" else None)

    def _release(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        """Free a row; the last row takes its index, in the cache and here."""
        sequence = self._running[row]
        with self.clock.measure("other"):
            if sequence.cache_prefix and reason in ("stop", "length"):
                cached = sequence.tokens[: self._cache.position(row) - sequence.handle.prompt_tokens]
                self.prefiller.cache(sequence.prompt, cached, self._cache.prefixes[row], self._cache.row(row))
            self._cache.drop(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        sequence.finish(reason, error)


def load_engine(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    loading: abc.Mapping[str, Any] | None = None,
    lora: abc.Mapping[str, str | Path] | None = None,
    **options: Any,
) -> Engine:
    """Load a checkpoint into an engine; `options` are those of `Engine`, `loading` those of `load_pretrained_model`.

    `device` and `dtype` default to the best available device and its dtype, see `llava.placement`. `lora` are
    directories of LoRA adapters by name, for `Request.lora`.
    """
    from llava.model.builder import load_pretrained_model
    from llava.model.lora_adapter import load_lora_adapter, served_base

    base = served_base(model_path, model_base) if lora else None

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
    ratio = options.get("image_aspect_ratio")
    adapters = [load_lora_adapter(name, path, model, base, ratio) for name, path in (lora or {}).items()]
    return Engine(model, tokenizer, image_processor, lora=adapters, **options)
