"""Engine statistics: tokens, cache hits, batch size, queueing, and the time of each part of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal, get_args

Part = Literal["tower", "prefill", "decode", "sampling", "detokenize", "other", "idle"]
_GAUGES: Final = ("running", "waiting", "max_batch_size", "kv_bytes", "prefix_bytes", "feature_bytes")


def _no_seconds() -> dict[Part, float]:
    return dict.fromkeys(get_args(Part), 0.0)


@dataclass(frozen=True)
class Statistics:
    """Counters of an engine since its creation, its current load, and the bytes that its caches hold.

    `prompt_tokens` is the sum of `computed_tokens` and `cached_tokens`. An image of a prompt is in a cached prefix, or
    its features are cached, or it is encoded. Running requests are never preempted: memory for the longest possible
    answer is reserved before a request starts.

    `seconds` adds up to the age of the engine. `tower` includes preprocessing on the engine's thread, `other` is
    scheduling and cache bookkeeping, and `idle` is the time outside `Engine.step`. All are host times: on CUDA,
    `sampling` includes waiting for the GPU.
    """

    requests: int = 0  # started
    waiting_seconds: float = 0.0  # of the started requests, from submission to start
    prompt_tokens: int = 0  # of prefilled prompts, image tokens included
    computed_tokens: int = 0  # prompt tokens that went through the model
    prefill_chunks: int = 0  # of prompts that took several forward passes
    cached_tokens: int = 0  # prompt tokens from the prefix cache, or computed for another prompt of the batch
    prefix_hits: int = 0  # requests with cached tokens
    prefix_evictions: int = 0  # nodes of the prefix cache
    images: int = 0  # of prefilled prompts
    encoded_images: int = 0
    feature_hits: int = 0  # images whose features were cached, or encoded for another prompt of the batch
    feature_evictions: int = 0  # images
    generated_tokens: int = 0
    decode_steps: int = 0
    decode_rows: int = 0  # requests in the batch, summed over the decode steps
    running: int = 0
    waiting: int = 0
    max_batch_size: int = 0
    kv_bytes: int = 0  # KV cache of the running requests
    prefix_bytes: int = 0
    feature_bytes: int = 0
    seconds: dict[Part, float] = field(default_factory=_no_seconds)

    def since(self, earlier: Statistics) -> Statistics:
        """The counters since `earlier`, with the current load and memory."""
        names = [item.name for item in fields(self) if item.name not in (*_GAUGES, "seconds")]
        counters = {name: getattr(self, name) - getattr(earlier, name) for name in names}
        seconds = {part: self.seconds[part] - earlier.seconds[part] for part in self.seconds}
        return replace(self, **counters, seconds=seconds)

    def summary(self) -> str:
        """One line: tokens, images, mean batch size and shares of the time."""
        cached = self.cached_tokens / max(1, self.prompt_tokens)
        batch = self.decode_rows / max(1, self.decode_steps)
        total = sum(self.seconds.values()) or 1.0
        shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in self.seconds.items())
        return (
            f"{self.prompt_tokens:,} prompt tokens ({cached:.0%} cached), {self.generated_tokens:,} generated; "
            f"{self.images:,} images ({self.encoded_images:,} encoded); "
            f"mean batch {batch:.1f} of {self.max_batch_size}; time: {shares}"
        )


class Clock:
    """Attributes the time since its creation to parts, initially `idle`; never synchronizes with a device."""

    def __init__(self) -> None:
        # Seconds of the parts, the current part and its start; replaced as one, for the threads that read it.
        self._state: tuple[dict[Part, float], Part, float] = (_no_seconds(), "idle", time.perf_counter())

    def _switch(self, part: Part) -> Part:
        now, (seconds, previous, since) = time.perf_counter(), self._state
        self._state = ({**seconds, previous: seconds[previous] + now - since}, part, now)
        return previous

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Attribute the time of the block to `part`, except for nested blocks."""
        previous = self._switch(part)
        try:
            yield
        finally:
            self._switch(previous)

    def seconds(self) -> dict[Part, float]:
        """Seconds of each part so far; thread-safe."""
        seconds, current, since = self._state
        return {**seconds, current: seconds[current] + max(0.0, time.perf_counter() - since)}
