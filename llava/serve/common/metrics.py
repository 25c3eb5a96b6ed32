"""Counters and gauges of a serving process, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What controller and worker count. One registry an application, so that a process may hold several."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("llava_requests", "Generation requests by outcome", ["outcome"], registry=registry)
        self.http = Counter("llava_http", "HTTP requests by path and status", ["path", "status"], registry=registry)
        self.tokens = Counter("llava_tokens", "Tokens by kind", ["kind"], registry=registry)
        self.seconds = Histogram(
            "llava_request_seconds", "Seconds to the last token", buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "llava_first_token_seconds", "Seconds to the first token", buckets=_SECONDS, registry=registry
        )

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when asked for."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        return generate_latest(self.registry)
