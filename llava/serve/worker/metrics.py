"""Prometheus metrics of the engine behind a worker, read from its statistics at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from llava.engine.statistics import Statistics

# Name, help text and field of a counter without labels.
_COUNTERS: Final = (
    ("prefix_cache_queries", "Prefix cache queries, in number of prompt tokens", "prompt_tokens"),
    ("prefix_cache_hits", "Prefix cache hits, in number of cached prompt tokens", "cached_tokens"),
    ("prefix_cache_hit_requests", "Number of requests with cached prompt tokens", "prefix_hits"),
    ("prefill_chunks", "Number of chunks of prompts that took several forward passes", "prefill_chunks"),
    ("prompt_images", "Number of images in prefilled prompts", "images"),
    ("feature_cache_hits", "Image feature cache hits, in number of images", "feature_hits"),
    ("encoded_images", "Number of images that the vision tower has encoded", "encoded_images"),
    ("generation_tokens", "Number of generated tokens", "generated_tokens"),
    ("decode_steps", "Number of decode steps", "decode_steps"),
    ("decode_rows", "Number of requests in the batch, summed over the decode steps", "decode_rows"),
)


class EngineCollector(Collector):
    """Collector of the engine's metrics; `read` returns None before the engine is loaded."""

    def __init__(self, read: Callable[[], Statistics | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        if stats is None:
            return
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(f"llava_{name}", text, value=getattr(stats, field))
        yield GaugeMetricFamily("llava_max_batch_size", "Largest number of requests in the batch", stats.max_batch_size)
        queue = "Seconds that requests have waited for a place in the batch"
        yield SummaryMetricFamily(
            "llava_queue_seconds", queue, count_value=stats.requests, sum_value=stats.waiting_seconds
        )
        evictions = CounterMetricFamily(
            "llava_cache_evictions", "Number of entries evicted from a cache", labels=["cache"]
        )
        evictions.add_metric(["prefix"], stats.prefix_evictions)
        evictions.add_metric(["feature"], stats.feature_evictions)
        yield evictions
        held = GaugeMetricFamily("llava_cache_bytes", "Bytes held by a cache", labels=["cache"])
        for cache, size in (("kv", stats.kv_bytes), ("prefix", stats.prefix_bytes), ("feature", stats.feature_bytes)):
            held.add_metric([cache], size)
        yield held
        text = "Seconds of the engine's thread, by part; on CUDA, sampling includes waiting for the GPU"
        seconds = CounterMetricFamily("llava_engine_seconds", text, labels=["part"])
        for part, value in stats.seconds.items():
            seconds.add_metric([part], value)
        yield seconds
